#!/bin/sh
# The first process in a container: sh -c GUARD nexa PROGRAM [ARGUMENT]...
#
# It passes signals on to every process there, ends as the program does, and ends everything where its standard input
# does: that is the lease of whoever started the container, and who may have been killed. Where it is not process 1,
# as in Apptainer's, who sends a signal from outside sends it to every process there: this one stops the second copy.
exec 3<&0 </dev/null
(
  trap '' TERM INT HUP USR1 USR2
  while read -r _ <&3; do :; done
  kill -s ALRM "$$"
) &
"$@" 3<&- &
child=$! code=
exec 3<&-
everyone=$child
[ "$$" != 1 ] || everyone=-1
tell() { caught=1; [ "$$" != 1 ] || kill -s "$1" -1; }
for each in TERM INT HUP USR1 USR2; do
  # shellcheck disable=SC2064
  trap "tell $each" "$each"
done
trap 'kill -s TERM "$everyone"; sleep 3; exit 137' ALRM
while :; do
  caught=
  wait "$child"
  now=$?
  # Asked again after a signal, a shell may have forgotten what it said.
  [ "$now" = 127 ] && [ -n "$code" ] || code=$now
  [ -n "$caught" ] || exit "$code"
done
