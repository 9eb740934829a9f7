# Submits one array, exactly once, and says what is known of it: one word, then what goes with it.
#
# Before this come the assignments run_dir, records (the folder of the intents), token, number, lock_seconds,
# sbatch_seconds, created, again, doubt, void, earlier, the functions void,
# write_trials and write_intent, and the command line of sbatch as the arguments.
# (`command` before exec and `true` for `:`, for a redirection that fails would end the shell without a word.)
cd -- "$run_dir" 2>/dev/null || { echo gone; exit 0; }
gone() {
  echo gone
  exit 0
}

# A client's own settings, or those of the trial that it runs in, are not for the jobs.
if [ -z "${nexa_clean-}" ]; then
  for nexa_name in $(env | sed -n 's/^\(NEXA_[A-Z_]*\)=.*/\1/p'); do unset "$nexa_name"; done
fi

# Whoever asks sbatch holds this lock, and sbatch inherits it: one that outlives its client is waited for.
command exec 9>>"$records/.sbatch.lock" || gone
flock -w "$lock_seconds" 9 || { echo busy; exit 0; }

# The intent comes first, and only one client's.
if [ ! -e "$records/$number.json" ]; then
  [ ! -e cancelled ] || { echo cancelled; exit 0; }
  write_trials || gone
  write_intent || gone
elif ! grep -qF -- "$created" "$records/$number.json"; then
  echo taken
  exit 0
fi

# A claim beats everything: trials have started under it, or nothing of it will ever run.
look_for_claim() {
  [ -L "claims/$token" ] || return 0
  if owner=$(readlink -- "claims/$token"); then echo "owned $owner"; exit 0; fi
}

look_up() {
  look_for_claim
  if [ -z "$doubt" ] && [ -s "$records/$number.answer" ]; then
    read -r answer <"$records/$number.answer"
    echo "$1 $answer"
    while IFS= read -r line || [ -n "$line" ]; do printf '%s\n' "$line"; done <"$records/$number.out"
    [ ! -s "$records/$number.err" ] || cat -- "$records/$number.err" >&2
    exit 0
  fi
  listed=$(SLURM_BITSTR_LEN=0 squeue -h -u "$(id -un)" -t all -o '%F|%j') || { echo unknown; exit 0; }
  id=$(printf '%s\n' "$listed" | awk -F'|' -v t="$token" '$2 == t { print $1; exit }')
  if [ -n "$id" ]; then echo "queued $id"; exit 0; fi
}

# The scheduler said no, and may say otherwise now: unless another client has asked it meanwhile, it is asked again.
# (An answer is one word a question: sbatch's exit code, and the process that asked.)
if [ -n "$again" ] && [ "$(cat -- "$records/$number.answer" 2>/dev/null)" = "$again" ]; then
  rm -f -- "$records/$number.asked"
fi
if [ -e "$records/$number.asked" ]; then
  look_up recorded
  [ -n "$void" ] || { echo missing; exit 0; }
  # Looked for twice, a grace period apart, and found nowhere: should it appear after all, it is void.
  ln -sT -- void "claims/$token" 2>/dev/null
  look_for_claim
  gone
fi
look_for_claim
[ ! -e cancelled ] || { echo cancelled; exit 0; }
# Nothing of what came before may start any more: the scheduler has forgotten it, and may remember.
for before in $earlier; do void "$before" || gone; done
[ ! -e "$records/$number.answer" ] || rm -f -- "$records/$number.answer" || gone
command true >"$records/$number.asked" || gone
# In a session of its own, sbatch outlives this shell and the connection.
export number records
setsid sh -c '
  "$@" >"$records/$number.out" 2>"$records/$number.err" </dev/null
  echo "$? $$" >"$records/$number.answer"
' sh "$@" >/dev/null 2>&1 </dev/null &
# The lock is now its alone: it is free as soon as sbatch has ended.
exec 9>&-
command exec 9>>"$records/.sbatch.lock" && flock -w "$sbatch_seconds" 9
look_up answered
echo unknown
