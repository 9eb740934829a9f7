#!/bin/bash
# A program inside an image, by whatever runs containers on this machine.
#
#   container.sh run PROGRAM [ARGUMENT]...    in the image, in the working directory, to its end
#   container.sh fetch                        brings the image, and ends
#
# container.conf beside it says which image, and what it sees. Who reaps: a trap here while this script lives; where it
# was killed, the container's own first process, whose standard input is a lease that ends with this script.

set -u
here=${BASH_SOURCE[0]%/*}
node=${SLURMD_NODENAME:-$HOSTNAME}
image='' digest='' runtime='' source='' file='' stamp='' cache='' auth_file='' network=none shm='' memory='' asked='' cpus='' processes=''
gpus=0 run='' command='' private='' code=0 told=0 mounts=() inside=() names=()
# shellcheck disable=SC1091
. "$here/container.conf"
# A trial that ran out of memory may be given more the next time.
if [[ -n $asked && ${SLURM_MEM_PER_NODE-} =~ ^[0-9]+$ ]] && ((SLURM_MEM_PER_NODE << 20 > asked)); then
  memory=$((SLURM_MEM_PER_NODE << 20))
fi
# A job may set PATH for its program; the runtime is found by the machine's own.
program_path=$PATH
PATH=${NEXA_HOST_PATH:-$PATH}

say() { printf 'container.sh: %s\n' "$1" >&2; }

stop() {
  say "$2"
  exit "$1"
}

# Sets `runtime` and `command`, or says what is missing.
choose() {
  local each
  if [[ $runtime == auto ]]; then
    for each in apptainer singularity docker; do
      command -v "$each" >/dev/null && { runtime=$each; break; }
    done
    [[ $runtime != auto ]] || stop 69 "nothing on $node runs containers: apptainer, singularity and docker are not installed"
  fi
  command=$(command -v "$runtime") || stop 69 "$runtime is not installed on $node: let job.setup load it, or set container.runtime"
}

# Whether a login for a registry is for its owner alone.
guarded() {
  local mode
  [[ -f $1 ]] || stop 78 "container.auth_file $1 is not there, on $node"
  mode=$(stat -L -c %a -- "$1") || exit 78
  [[ $mode == [46]00 ]] || stop 78 "container.auth_file $1 has mode $mode: chmod 600 it"
}

# A folder of this script's own on the machine, and in it the program's scratch; those of killed scripts go first.
make_private() {
  local left pid base=${TMPDIR:-/tmp}
  for left in "$base"/nexa-container-"$UID"-*; do
    pid=${left##*/nexa-container-"$UID"-}
    pid=${pid%%-*}
    [[ -d $left && ! -L $left && -O $left && $pid == +([0-9]) && ! -e /proc/$pid ]] && rm -rf -- "$left"
  done
  # A name that somebody has taken is refused: no link is followed, and no folder of another's is used.
  printf -v private '%s/nexa-container-%d-%d-%06d' "$base" "$UID" "$$" "$((RANDOM * 32768 + RANDOM))"
  mkdir -m 700 -- "$private" "$private/scratch" || stop 73 "no scratch folder can be made in $base on $node"
}

tidy() {
  [[ $private != */nexa-container-"$UID"-$$-+([0-9]) ]] || rm -rf -- "$private"
}

# Registry logins as Docker and Apptainer read them.
log_in() {
  local folder=$private/login
  if [[ -n ${NEXA_REGISTRY_LOGIN-} ]]; then
    (umask 077 && mkdir -- "$folder" && printf '%s' "$NEXA_REGISTRY_LOGIN" >"$folder/config.json") || exit 73
    unset NEXA_REGISTRY_LOGIN
  elif [[ -n $auth_file ]]; then
    guarded "$auth_file"
    mkdir -- "$folder"
    ln -s -- "$(readlink -f -- "$auth_file")" "$folder/config.json"
  else
    return 0
  fi
  # Apptainer has another name for the same file.
  ln -s -- config.json "$folder/docker-config.json"
  export DOCKER_CONFIG=$folder APPTAINER_CONFIGDIR=$folder SINGULARITY_CONFIGDIR=$folder
}

# --- Docker

docker_answers() {
  local said
  said=$("$command" version --format '{{.Server.Version}}' 2>&1) && return
  said=${said##*$'\n'}
  stop 69 "Docker's engine does not answer on $node: $said"
}

docker_fetch() {
  local said
  "$command" image inspect --format . "$image" >/dev/null 2>&1 && return
  docker_answers
  [[ $source != local ]] || stop 66 "the image $image is no longer on $node: push it, and name it by its registry"
  if [[ $source == archive ]]; then
    say "loading $file"
    said=$("$command" load --quiet --input "$file" 2>&1) || stop 74 "$file cannot be loaded on $node: ${said##*$'\n'}"
    "$command" image inspect --format . "$image" >/dev/null 2>&1 && return
    stop 66 "$file has changed since the run was submitted: it no longer holds $image"
  fi
  say "pulling $image"
  log_in
  said=$("$command" pull --quiet "$image" 2>&1 >/dev/null) && return
  docker_answers
  case $said in
    *'no space left'*) stop 74 "the disk of Docker's engine on $node is full, $image could not be pulled: ${said##*$'\n'}" ;;
    *denied* | *unauthorized* | *'no basic auth'*)
      stop 77 "the registry refuses $image on $node: log in there, or set container.auth_file: ${said##*$'\n'}" ;;
  esac
  stop 74 "$image could not be pulled on $node: ${said##*$'\n'}"
}

docker_run() {
  local options=() name began guard at=0 each
  docker_fetch
  name=nexa-$run-${NEXA_TRIAL:-0}-${NEXA_ATTEMPT:-1}-${SLURM_NODEID:-0}
  options=(run --rm -i --pull never --log-driver none --name "$name" --label "nexa.run=$run"
    --label "nexa.trial=${NEXA_TRIAL:-}" --label "nexa.attempt=${NEXA_ATTEMPT:-}" --label "nexa.job=${SLURM_JOB_ID:-}"
    --security-opt no-new-privileges --network "$network" --user "$(id -u):$(id -g)" --workdir "$PWD"
    --entrypoint /bin/sh --env HOME=/scratch --env TMPDIR=/scratch --env NEXA_GUARDED=1)
  for each in $(id -G); do options+=(--group-add "$each"); done
  while ((at < ${#mounts[@]})); do
    options+=(--mount "type=bind,$(csv "source=${mounts[at]}"),$(csv "target=${mounts[at + 1]}")${mounts[at + 2]:+,readonly}")
    at=$((at + 3))
  done
  for each in "${names[@]}"; do
    case $each in
      PATH) options+=(--env "PATH=$program_path") ;;
      *) options+=(--env "$each") ;;
    esac
  done
  # What the docker command itself would read is given by value; what may be secret, by name.
  for ((at = 0; at < ${#inside[@]}; at += 2)); do options+=(--env "${inside[at]}=${inside[at + 1]}"); done
  # Without a network its own name would lead nowhere, and programs that look it up would wait.
  [[ $network == host ]] || options+=(--hostname nexa --add-host nexa:127.0.0.1)
  [[ -z $shm ]] || options+=(--shm-size "$shm")
  [[ -z $memory ]] || options+=(--memory "$memory" --memory-swap "$memory")
  [[ -z $cpus ]] || options+=(--cpus "$cpus")
  [[ -z $processes ]] || options+=(--pids-limit "$processes")
  # Docker's engine is no part of the job: what Slurm has bound the job to is passed on.
  [[ -z ${SLURM_JOB_ID-} || ${NEXA_SCHEDULER-} == local ]] ||
    options+=(--cpuset-cpus "$(sed -n 's/^Cpus_allowed_list:\t//p' /proc/self/status)")
  if ((gpus)); then
    need_gpus
    if [[ $gpu_kind == nvidia ]]; then
      grant_gpus
    else
      options+=(--device /dev/kfd --device /dev/dri)
    fi
  fi
  guard=$(<"$here/guard.sh") || exit 66
  began=$(date +%s.%N)
  carry "$command" "${options[@]}" "$image" -c "$guard" nexa "$@"
  # A docker that was ended early may have had a container made, and not started it.
  if ((told && code)); then
    sleep 0.2
    "$command" rm --force --volumes "$name" >/dev/null 2>&1
  fi
  if ((code == 137)) && ran_out "$command" "$name" "$began"; then
    say "the kernel ended the program for its memory${memory:+: it was given $((memory >> 20)) MiB}"
    [[ -z ${NEXA_STATUS-} ]] || printf 'why\t%s\t%s\toom\n' "$NEXA_TRIAL" "$NEXA_ATTEMPT" >>"$NEXA_STATUS"
  elif ((code == 125)); then
    docker_answers
  elif ((code == 137 || code == 143)) && ((!told)); then
    # Nobody here has ended it. An engine that is being stopped ends its containers first, and answers a little longer.
    for at in {1..10}; do
      docker_answers
      sleep 0.2
    done
  fi
}

# Says whether the kernel has ended something in a container for its memory. On a busy node Docker's engine hears of it
# a moment after the end.
ran_out() {
  local at
  for at in {1..5}; do
    ((at == 1)) || sleep 0.2
    [[ -z $("$1" events --since "$3" --until "$(date +%s.%N)" --filter "container=$2" --filter event=oom \
      --format '{{.Action}}' 2>/dev/null) ]] || return 0
  done
  return 1
}

# Adds to `options` the GPUs that the job was granted. Docker's engine sees all of the node's, and counts them as the
# node does, where a job may count its own from 0; in a container they are counted from 0 once more.
grant_gpus() {
  local granted=${SLURM_STEP_GPUS:-${SLURM_JOB_GPUS:-${CUDA_VISIBLE_DEVICES:-}}} inner='' count=0 each
  if [[ -z $granted ]]; then
    options+=(--gpus all)
    return
  fi
  options+=(--gpus "\"device=$granted\"")
  [[ $granted =~ ^[0-9]+(,[0-9]+)*$ ]] || return # by their own names, which hold inside as well
  for each in ${granted//,/ }; do inner+=,$((count++)); done
  options+=(--env "CUDA_VISIBLE_DEVICES=${inner#,}")
}

# A field of --mount, which is read as CSV.
csv() { printf '"%s"' "${1//\"/\"\"}"; }

# --- Apptainer and Singularity

# Sets `image` to the SIF of the image, which one of all who ask builds.
sif_fetch() {
  local sif=$cache/${digest#sha256:}.sif me owner='' failed before='' waited=0 log
  if [[ $source == sif ]]; then
    unchanged
    image=$file
    return
  fi
  me=$node.$$.$(cut -d ' ' -f 22 "/proc/$$/stat") log=${sif%.sif}.log
  mkdir -p -- "$cache" || stop 73 "images cannot be kept in $cache on $node"
  before=$(cat -- "$sif.failed" 2>/dev/null)
  while [[ ! -e $sif ]]; do
    [[ $source != archive ]] || unchanged
    # One that failed while this script waited fails for it as well.
    failed=$(cat -- "$sif.failed" 2>/dev/null)
    [[ -z $failed || $failed == "$before" ]] || stop 74 "$image could not be made a SIF; $log ends: ${failed#* }"
    if ln -sT -- "$me" "$sif.lock" 2>/dev/null; then
      failed=$(cat -- "$sif.failed" 2>/dev/null)
      if [[ -n $failed && $failed != "$before" ]]; then
        rm -f -- "$sif.lock"
        continue
      fi
      if [[ ! -e $sif ]] && ! sif_build; then
        printf '%s %s' "$me" "$(tail -n 3 -- "$log")" >"$sif.failed"
        rm -f -- "$sif.lock"
        stop 74 "$image could not be made a SIF on $node; $log ends: $(tail -n 3 -- "$log")"
      fi
      rm -f -- "$sif.failed" "$sif.lock"
      break
    fi
    [[ $owner == "$(readlink -- "$sif.lock")" ]] || owner=$(readlink -- "$sif.lock") waited=0
    ((waited++)) || say "waiting for ${owner%%.*} to build $sif"
    if [[ -n $owner ]] && abandoned; then
      # Another may have broken it meanwhile, and taken it: then it is given back.
      if mv -T -- "$sif.lock" "$sif.lock.$me" 2>/dev/null; then
        [[ $(readlink -- "$sif.lock.$me") == "$owner" ]] || ln -sT -- "$(readlink -- "$sif.lock.$me")" "$sif.lock" 2>/dev/null
        rm -f -- "$sif.lock.$me" "$sif.$owner.part"
      fi
      continue
    fi
    sleep "$((waited < 10 ? 0 : waited < 60 ? 2 : 5)).$((RANDOM % 900 + 100))"
  done
  image=$sif
}

# Stops where an image's file is another one by now.
unchanged() {
  [[ $(stat -L -c '%s %Y' -- "$file" 2>/dev/null) == "$stamp" ]] ||
    stop 66 "$file has changed since the run was submitted, or is not there, on $node"
}

# Whether the builder is gone: its process, where it was on this node; its heartbeat elsewhere, by the file system's
# own clock.
abandoned() {
  local started=${owner##*.} pid=${owner%.*} probe last
  if [[ ${pid%.*} == "$node" ]]; then
    [[ $(cut -d ' ' -f 22 "/proc/${pid##*.}/stat" 2>/dev/null) != "$started" ]]
    return
  fi
  ((waited % 20 == 0)) || return
  probe=$sif.probe.$me
  : >"$probe"
  last=$(stat -c %Y -- "$sif.beat" "$sif.lock" 2>/dev/null | sort -n | tail -n 1)
  last=$(($(stat -c %Y -- "$probe") - ${last:-0}))
  rm -f -- "$probe"
  ((last > 120))
}

sif_build() {
  local draft=$sif.$me.part beat result squash from=docker://$image
  [[ $source != archive ]] || from=docker-archive:archive.tar
  printf 'BUILD %s from %s by %s, %s\n' "$sif" "${file:-$from}" "$me" "$(date -u +%FT%TZ)" >>"$log" || return
  say "building $sif from ${file:-$from}"
  while :; do
    : >"$sif.beat"
    sleep 5
  done </dev/null >/dev/null 2>&1 & # its last sleep outlives it, and is not to hold the streams open
  beat=$!
  trap 'kill "$beat" 2>/dev/null; rm -f -- "$draft" "$sif.lock" "$sif.beat"; exit 143' TERM INT HUP
  (
    log_in
    # A path in the archive's place would end at its first colon.
    [[ $source != archive ]] || { ln -sfT -- "$file" "$private/archive.tar" && cd -- "$private"; } || exit 73
    # By itself it would take every core of the machine, and a quarter of its memory.
    squash="-processors $(nproc)${memory:+ -mem $((memory >> 25 ? memory >> 21 : 16))M}"
    export APPTAINER_MKSQUASHFS_ARGS=${APPTAINER_MKSQUASHFS_ARGS-$squash}
    # Only the loopback speaks plain HTTP.
    [[ ! $image =~ ^(127(\.[0-9]+){3}|localhost|\[::1\])(:[0-9]+)?/ ]] || export APPTAINER_NOHTTPS=1 SINGULARITY_NOHTTPS=1
    "$command" build --disable-cache --force -- "$draft" "$from"
  ) </dev/null >>"$log" 2>&1 && mv -T -- "$draft" "$sif"
  result=$?
  trap - TERM INT HUP
  kill "$beat" 2>/dev/null
  rm -f -- "$draft" "$sif.beat"
  return "$result"
}

sif_run() {
  local options=(exec --contain --cleanenv --ipc --pid --home "$private/scratch:/scratch" --pwd "$PWD") at=0 each guard
  local prefix=APPTAINERENV
  [[ $runtime == apptainer ]] || prefix=SINGULARITYENV
  sif_fetch
  [[ $network == host ]] || options+=(--net --network none)
  while ((at < ${#mounts[@]})); do
    options+=(--mount "type=bind,$(csv "source=${mounts[at]}"),$(csv "destination=${mounts[at + 1]}")${mounts[at + 2]:+,ro}")
    at=$((at + 3))
  done
  for each in "${names[@]}"; do
    case $each in
      PATH) export "${prefix}_PATH=$program_path" ;;
      *) export "${prefix}_$each=${!each}" ;;
    esac
  done
  for ((at = 0; at < ${#inside[@]}; at += 2)); do export "${prefix}_${inside[at]}=${inside[at + 1]}"; done
  # Values are what they are, and no shell's words.
  export "${prefix}_TMPDIR=/scratch" APPTAINER_NO_EVAL=1 SINGULARITY_NO_EVAL=1
  if ((gpus)); then
    need_gpus
    if [[ $gpu_kind == nvidia ]]; then options+=(--nv); else options+=(--rocm); fi
  fi
  guard=$(<"$here/guard.sh") || exit 66
  carry "$command" "${options[@]}" "$image" /bin/sh -c "$guard" nexa "$@"
}

# --- both

# Sets `gpu_kind`, or says that there are none.
need_gpus() {
  if [[ -e /dev/kfd ]]; then
    gpu_kind=rocm
  elif compgen -G '/dev/nvidia[0-9]*' >/dev/null || [[ -e /dev/dxg ]]; then
    gpu_kind=nvidia
  else
    stop 69 "the job asks for $gpus GPUs a node, but $node has none: no /dev/nvidia*, no /dev/kfd"
  fi
}

# Adds a place that is seen in the container as it is outside; `ro` as the second argument makes it read-only.
see() { mounts+=("$1" "$1" "${2-}"); }

# Runs a command whose standard input is open as long as this script lives, and sets `code`, whatever signals come in;
# `told` says whether one came that was to end it.
carry() {
  local lease child
  # The command gets each signal as well, from the process group or the job step.
  trap told=1 TERM INT HUP
  trap : USR1 USR2
  exec {lease}> >(
    trap '' TERM INT HUP USR1 USR2
    exec 3>&2 2>/dev/null
    (
      trap - TERM INT HUP USR1 USR2
      exec -- "$@"
    ) 2>&3 3>&-
    printf '%s' "$?" >"$private/code"
  )
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  exec {lease}>&-
  { code=$(<"$private/code"); } 2>/dev/null
  code=${code:-137}
}

# What of this environment the program has a right to: what the run sets, and what the config names.
collect_names() {
  local each
  for each in $(compgen -e); do
    case $each in
      NEXA_HOST_PATH | NEXA_STATUS | NEXA_CONTAINER_NAMES) ;;
      NEXA_* | SLURM_* | SLURMD_* | OMP_NUM_THREADS | CUDA_VISIBLE_DEVICES | ROCR_VISIBLE_DEVICES | HIP_VISIBLE_DEVICES | \
        GPU_DEVICE_ORDINAL | NCCL_* | GLOO_* | WANDB_* | MLFLOW_*) names+=("$each") ;;
    esac
  done
  for each in ${NEXA_CONTAINER_NAMES-}; do
    case $each in
      NEXA_* | SLURM_* | HOME | TMPDIR) ;;
      *) [[ -z ${!each+set} ]] || names+=("$each") ;;
    esac
  done
}

# Ends this process group once the lease that a caller gave by its descriptor is over: the caller has ended.
keep_lease() {
  (
    trap '' TERM INT HUP USR1 USR2
    while read -r _ <&"$NEXA_LEASE"; do :; done
    kill -s TERM -- -$$
    sleep 3
    kill -s KILL -- -$$
  ) >/dev/null 2>&1 &
  exec {NEXA_LEASE}<&-
  unset NEXA_LEASE
}

shopt -s extglob
[[ -z ${NEXA_LEASE-} ]] || keep_lease
verb=$1
shift
choose
make_private
trap tidy EXIT
case $verb in
  fetch)
    # On the standard input a login is in nobody's arguments and environment.
    [[ ${NEXA_REGISTRY_LOGIN-} != - ]] || { export -n NEXA_REGISTRY_LOGIN && NEXA_REGISTRY_LOGIN=$(cat); }
    if [[ $runtime == docker ]]; then docker_fetch; else sif_fetch; fi
    ;;
  run)
    cd -P . || exit 73
    [[ $network == host ]] || export NEXA_ALONE=1
    see "$PWD" ro
    [[ -z ${NEXA_RUN_DIR-} ]] || see "$NEXA_RUN_DIR"
    case ${NEXA_CHECKPOINT_DIR-} in
      '' | "${NEXA_RUN_DIR-}"/*) ;;
      *) see "$NEXA_CHECKPOINT_DIR" ;;
    esac
    collect_names
    if [[ $runtime == docker ]]; then
      mounts+=("$private/scratch" /scratch '')
      docker_run "$@"
    else
      sif_run "$@"
    fi
    exit "$code"
    ;;
  *) exit 64 ;;
esac
