#!/usr/bin/env bash
# Pre-train, export and fine-tune, evaluate: three jobs in one submission, each after the one before has succeeded.
#
#   launch/pipeline.sh DIRECTORY SCRIPT FINETUNE_RECIPE CORPUS [--section.key VALUE ...]
#   launch/pipeline.sh runs/7b launch/pretrain_7b.slurm recipes/finetune_full.yaml corpora/pmc --backend fsdp
#
# The options are those of pre-training. DIRECTORY gets pretrain/, model/ (what pre-training exports), finetune/, and
# finetune/evaluation.json: the perplexity of the fine-tuned model on the papers that CORPUS holds out. A job that
# fails for good takes those that wait for it with it. The numbers of the three jobs are printed.
#
#   PMC_SBATCH_OPTIONS   options of sbatch for all three, by spaces, such as --nodes=2. With --array=0-2, %a in any
#                        argument stands for the number of the task, and each task waits for its own.
set -euo pipefail

if [[ $# -lt 4 || $1 = -* ]]; then
    echo "usage: $0 DIRECTORY SCRIPT FINETUNE_RECIPE CORPUS [--section.key VALUE ...]" >&2
    exit 2
fi
directory=$1 script=$2 recipe=$3 corpus=$4
shift 4
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for file in "$script" "$recipe"; do
    [[ -f $file ]] || { echo "$0: error: there is no file $file" >&2; exit 2; }
done

read -ra options <<<"${PMC_SBATCH_OPTIONS:-}"
after=afterok
[[ " ${options[*]}" != *" --array"* && " ${options[*]}" != *" -a"* ]] || after=aftercorr

submit() { sbatch --parsable "${options[@]}" "$@" | cut -d ';' -f 1; }

first=$(submit "$script" "$@" --output "$directory/pretrain")
unset PMC_RECIPE # of pre-training
second=$(PMC_BASE=$directory/pretrain PMC_MODEL=$directory/model \
    submit --dependency="$after:$first" --kill-on-invalid-dep=yes \
    "$launch/finetune.slurm" "$recipe" --output "$directory/finetune")
third=$(submit --dependency="$after:$second" --kill-on-invalid-dep=yes \
    "$launch/evaluate.slurm" "$directory/finetune" --heldout "$corpus" --output "$directory/finetune/evaluation.json")
echo "pre-train $first, fine-tune $second, evaluate $third"
