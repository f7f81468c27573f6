# shellcheck shell=bash disable=SC2034,SC2154 # variables are used by the scripts that source this
# What follows an attempt to train, by its exit code. slurm.sh and torchrun.sh source this. They set `run`, `logs` (of this
# attempt), `attempts` (the table of attempts), `id` and `attempt` (its name, which begins with id), `ran` ("rank" if
# training was started), `code` and `members` (the nodes), and define
#   may_repeat         whether the job may be repeated; prints the reason if not
#   repeat             repeats it
#   last_lines         prints the last line of each rank except the first

note() { echo "[$(date '+%F %T')] $1"; }

# Waits for `step` and sets `code`. A signal to this shell interrupts `wait`, so it is repeated.
wait_for_step() {
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || true
    done
    wait "$step" || code=$?
    step=''
}

newest_checkpoint() {
    local all=("$run"/checkpoints/step-*/manifest.json)
    if [[ -e ${all[-1]} ]]; then
        basename "$(dirname "${all[-1]}")"
    else
        echo none
    fi
}

# Records the result of this attempt, then ends the job or repeats it.
conclude() {
    local newest failures
    newest=$(newest_checkpoint)
    printf '%s\t%s\t%s\t%s\n' "$attempt" "$newest" "$code" "$members" >>"$attempts"
    note "exit code $code, newest checkpoint: $newest"
    if ((code == 0)) && [[ $ran == rank ]]; then
        exit 0
    fi
    last_lines | head -n 16 || true # head closes the pipe after 16 lines
    # 13, 126 and 127 are the codes of srun and bash for a program that cannot be started.
    case $code in
        2 | 13 | 126 | 127)
            note "not repeated: repeating cannot help; the message above explains what to correct"
            exit 2
            ;;
    esac
    if ((code == 1)) && [[ -e $run/diverged.txt ]]; then
        note "not repeated: the run diverged, see $run/diverged.txt"
        exit "$code"
    fi
    may_repeat || exit "$code"
    if ((code != 0 && code != 75)); then
        failures=$(awk -F '\t' -v job="$id." -v newest="$newest" \
            'index($1, job) == 1 && $2 == newest && $3 != 0 && $3 != 75 { n++ } END { print n + 0 }' "$attempts")
        if ((failures > ${RETRIES:-3})); then
            note "$failures failures without a new checkpoint: given up"
            exit "$code"
        fi
    fi
    repeat
}
