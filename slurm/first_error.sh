#!/bin/bash
# Show where a failure began: bash slurm/first_error.sh FOLDER. When a rank fails, the others fail
# after it, each with its own traceback. So the rank whose log ended first has the cause. The
# result also goes to FOLDER/00-first-error.txt.
cd "$1" || exit 2
mark='^Traceback \(most recent|^error: |^[A-Za-z.]*Error: |(srun|slurmstepd).*: error'
for logs in rank-*.log '*.log'; do # launchers' errors count only if no rank has one
  # shellcheck disable=SC2086 # a pattern
  log=$(grep -lE "$mark" $logs 2>/dev/null | xargs -r ls -tr | head -n 1)
  [ -z "$log" ] || break
done
{
  if [ -n "$log" ]; then
    echo "first error, in $1/$log:"
    sed -nE "/$mark/,\$p" "$log" | head -n 40
  else
    echo "no error in the logs; their last lines:"
    tail -n 5 ./*.log
  fi
} | tee 00-first-error.txt
