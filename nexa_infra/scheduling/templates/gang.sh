#!/bin/bash
# One torchrun on each node of a job, and what it starts: a log and a record for each rank.
#
#   gang.sh node COUNT torchrun [OPTION]... PROGRAM [ARGUMENT]...    COUNT words go to torchrun
#   gang.sh rank PROGRAM [ARGUMENT]...                               started by torchrun
#
# job.sbatch starts the first by srun, once a node, and says by NEXA_GANG_* what the launcher asks.
# In NEXA_RANK_DIR lie rank-N.log, and a file node-N for each node, whose lines are tab-separated:
# `node NAME MOMENT ENDPOINT`, `agent PID`, `start RANK RESTART PID MOMENT`, `end RANK RESTART CODE MOMENT`, `over CODE`.

set -u

say() { printf 'gang.sh: %s\n' "$1" >&2; }

now() {
  if [[ -n ${EPOCHREALTIME-} ]]; then
    moment=${EPOCHREALTIME/,/.}
  else
    printf -v moment '%(%s)T' -1
  fi
}

# How many of a comma-separated list there are.
count() {
  local -a words
  IFS=, read -ra words <<<"$1"
  echo "${#words[@]}"
}

# The GPUs that this node has granted.
granted() {
  local name
  for name in CUDA_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ZE_AFFINITY_MASK; do
    [[ -z ${!name-} || ${!name} == NoDevFiles ]] || { count "${!name}"; return; }
  done
  echo "${SLURM_GPUS_ON_NODE:-0}"
}

# Sets `processes`, by what the launcher asks for.
processes() {
  local gpus
  gpus=$(granted)
  case $NEXA_GANG_PROCESSES in
    gpu) processes=$gpus ;;
    cpu) processes=$NEXA_GANG_CORES ;;
    auto) processes=$((gpus ? gpus : NEXA_GANG_TASKS)) ;;
    *) processes=$NEXA_GANG_PROCESSES ;;
  esac
  if ((processes == 0)); then
    say "nproc_per_node: $NEXA_GANG_PROCESSES, but $node has granted no GPU to this job"
    exit 78
  elif ((gpus && processes > gpus)) && [[ $NEXA_GANG_PROCESSES != cpu ]]; then
    say "nproc_per_node: $NEXA_GANG_PROCESSES makes $processes processes, but $node has granted $gpus GPUs"
    exit 78
  fi
}

# A process that dies of any signal: where it lives on, this shell alone was told.
start_canary() {
  (
    trap - TERM USR1 USR2
    exec sleep 2147483647
  ) &
  canary=$!
}

# Whether a signal has come to this shell alone, and not to every process of the job step.
told_alone() {
  for _ in {1..10}; do
    if ! kill -0 "$canary" 2>/dev/null; then
      start_canary
      return 1
    fi
    sleep 0.05
  done
}

# Passes a warning on to this node's ranks: torchrun itself knows nothing of it.
warn() {
  local word rank restart pid
  local -A alive=()
  # Ranks that end from here on are not started again.
  [[ $1 != "${NEXA_GANG_WARNING-USR1}" ]] || : >"$NEXA_RANK_DIR/warned"
  # On a machine without Slurm the whole process group was told, and ranks are in sessions of their own.
  # In a Docker container its first process has told all of them, wherever they are.
  told_alone || [[ ${NEXA_SCHEDULER-} == local && -z ${NEXA_GUARDED-} ]] || return
  while IFS=$'\t' read -r word rank restart pid _; do
    case $word in
      start) alive[$rank]=$pid ;;
      end) unset "alive[$rank]" ;;
    esac
  done <"$record"
  for pid in ${alive[@]+"${alive[@]}"}; do kill -s "$1" "$pid" 2>/dev/null; done
}

# Gives up nodes that have not found each other: torchrun itself may wait for ever for a store that says nothing.
give_up() {
  local word pid last=''
  read -rt $((NEXA_GANG_TIMEOUT + 10)) _ <> <(:) # a sleep that leaves no process behind
  while read -r word pid _; do
    case $word in
      agent) last=$pid ;;
      start) return ;;
    esac
  done <"$record"
  say "the nodes have not met at $NEXA_GANG_ENDPOINT within $NEXA_GANG_TIMEOUT s"
  kill -s KILL "$last"
}

# Ends torchrun, which ends its ranks by TERM and gives them time. A second TERM would take that time away.
finish() {
  told_alone || return
  local word pid last=''
  while read -r word pid _; do
    [[ $word != agent ]] || last=$pid
  done <"$record"
  [[ -z $last ]] || kill -s TERM "$last" 2>/dev/null
}

# Starts torchrun on this node and ends as it does.
node() {
  local length=$1 agent python word code
  shift
  local -a command=("${@:1:length}") program=("${@:length + 1}") options
  mkdir -p -- "$NEXA_RANK_DIR" || exit 73
  now
  printf 'node\t%s\t%s\t%s\n' "$node" "$moment" "$NEXA_GANG_ENDPOINT" >>"$record" || exit 73
  if ! agent=$(command -v torchrun); then
    say "torchrun is not installed on $node: let job.setup load what holds it, or install PyTorch there"
    exit 127
  fi
  processes
  options=("--nproc-per-node=$processes" "--max-restarts=$NEXA_GANG_RESTARTS")
  if [[ -n ${NEXA_GANG_PLACED-} && ${NEXA_SCHEDULER-} != local ]]; then
    options+=("--nnodes=$NEXA_GANG_NODES" "--node-rank=${SLURM_NODEID:-0}") # its own options say where
  elif [[ -z $NEXA_GANG_ENDPOINT ]]; then
    options+=(--standalone)
    # In a container without a network the node's name leads nowhere.
    [[ -z ${NEXA_ALONE-} ]] || options+=(--local-addr=localhost)
  elif [[ $NEXA_GANG_BACKEND == static ]]; then
    options+=("--nnodes=$NEXA_GANG_NODES" --rdzv-backend=static "--node-rank=${SLURM_NODEID:-0}"
      "--master-addr=${NEXA_GANG_ENDPOINT%:*}" "--master-port=${NEXA_GANG_ENDPOINT##*:}"
      "--rdzv-conf=timeout=$NEXA_GANG_TIMEOUT")
  else
    local conf=join_timeout=$NEXA_GANG_TIMEOUT,read_timeout=$NEXA_GANG_TIMEOUT
    # Which node keeps the store is known, and not for torchrun to guess from names.
    [[ -z $NEXA_GANG_HEAD ]] || conf+=,is_host=$((${SLURM_NODEID:-0} == 0))
    options+=("--nnodes=$NEXA_GANG_NODES" "--rdzv-id=$NEXA_RUN_ID-$NEXA_TRIAL-$NEXA_ATTEMPT"
      "--rdzv-backend=$NEXA_GANG_BACKEND" "--rdzv-endpoint=$NEXA_GANG_ENDPOINT" "--rdzv-conf=$conf")
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((NEXA_GANG_CORES > processes ? NEXA_GANG_CORES / processes : 1))}
  python=${agent%/*}/python3
  [[ -x $python ]] || python=python3
  program=("$python" -u "${program[@]}")
  for word in "${command[@]}"; do
    [[ $word != --no[-_]python ]] || program=("${program[@]:2}")
  done
  start_canary
  trap 'warn USR1' USR1
  trap 'warn USR2' USR2
  trap finish TERM
  # Bash can lose the status of a child that ends while a signal comes in: it is written where none does.
  (
    trap '' TERM USR1 USR2
    exec 3>&2 2>/dev/null
    (
      printf 'agent\t%s\n' "$BASHPID" >>"$record"
      trap - TERM # a warning is for the ranks; those that do not know of it go on
      exec "$agent" "${options[@]}" "${command[@]:1}" --no-python bash "$0" rank "${program[@]}"
    ) 2>&3 3>&-
    printf 'over\t%s\n' "$?" >>"$record"
  ) &
  child=$!
  if [[ -n $NEXA_GANG_ENDPOINT ]]; then
    give_up &
    others=$!
  fi
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  kill -s KILL "$canary" ${others:+"$others"} 2>/dev/null
  while read -r word code _; do
    [[ $word != over ]] || exit_code=$code
  done <"$record"
  exit "${exit_code:-1}"
}

# Keeps what comes in within job.log_limit, the beginning and the end of it, as job.sbatch does.
keep() {
  local file=$1 half quarter block room size byte LC_ALL=C
  trap '' TERM INT HUP USR1 USR2
  read -r half quarter block <<<"$NEXA_GANG_LOG"
  room=$half
  while IFS= read -r -d '' -n 1 byte; do
    size=0
    [[ ! -s $file ]] || size=$(stat -c %s -- "$file")
    if ((size + block >= room)); then
      [[ ! -e $1.last ]] || mv -f -- "$1.last" "$1.before"
      file=$1.last room=$quarter size=0
    fi
    {
      if [[ -n $byte ]]; then printf '%s' "$byte"; else printf '\0'; fi &&
        dd bs="$block" count=$(((room - size - 1) / block)) status=none
    } >>"$file" || exec cat >/dev/null
  done
}

# Runs a rank in its own log; rank 0 is heard as well. Ends as its program does, by the same signal.
rank() {
  # shellcheck disable=SC2153
  local number=$RANK restart=${TORCHELASTIC_RESTART_COUNT:-0} code heard=()
  local log=$NEXA_RANK_DIR/rank-$number.log
  # A rank that ended for its warning is not to be started again, though torchrun takes it for a failure.
  [[ ! -e $NEXA_RANK_DIR/warned ]] || exit 143
  exec 8>>"$log"
  if [[ -n ${NEXA_GANG_LOG-} ]]; then
    exec 8> >(keep "$log")
    heard+=("$!")
  fi
  if [[ $number == 0 ]]; then
    exec 6> >(trap '' TERM INT HUP; exec tee -a /dev/fd/8)
    heard+=("$!")
    exec 7> >(trap '' TERM INT HUP; exec tee -a /dev/fd/8 >&2)
    heard+=("$!")
  else
    exec 6>&8 7>&8
  fi
  [[ $restart == 0 ]] || printf '%s restart %s %s\n' -- "$restart" -- >&6
  # torchrun ends a rank by TERM to its whole group: what the program does then is waited for.
  trap '' TERM INT HUP
  exec 3>&2 2>/dev/null # what bash says of a child's death is no word of the program's
  (
    trap - TERM INT HUP
    now
    printf 'start\t%s\t%s\t%s\t%s\n' "$number" "$restart" "$BASHPID" "$moment" >>"$record"
    exec -- "$@"
  ) >&6 2>&7 3>&- 6>&- 7>&- 8>&-
  code=$?
  now
  printf 'end\t%s\t%s\t%s\t%s\n' "$number" "$restart" "$code" "$moment" >>"$record"
  exec 6>&- 7>&- 8>&- 2>&3
  # What the program has left behind may hold its output open: that is waited for no longer than a second.
  for _ in {1..100}; do
    kill -0 ${heard[@]+"${heard[@]}"} 2>/dev/null || break
    sleep 0.01
  done
  if ((code > 128 && code <= 192)); then
    trap - TERM INT HUP
    kill -s $((code - 128)) "$BASHPID"
  fi
  exit "$code"
}

node=${SLURMD_NODENAME:-$HOSTNAME}
record=$NEXA_RANK_DIR/node-${SLURM_NODEID:-0}
case $1 in
  node | rank) "$@" ;;
  *) exit 64 ;;
esac
