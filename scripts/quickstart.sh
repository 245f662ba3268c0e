#!/usr/bin/env bash
# From raw text to a model that fills in masks, in minutes: corpus, tokenizer, shards, training,
# evaluation, export, predictions.
#   bash scripts/quickstart.sh                  Kant, or Python's documentation without a network
#   bash scripts/quickstart.sh --corpus FILE    your own text, in any language and format
# Settings of configs/quickstart.yaml may follow: --training.max_steps=4000
# So may what scripts/tokenize_corpus.py is told of a text: --text_field content
# Finished stages are skipped when it runs again; an interrupted one goes on.
set -euo pipefail

corpus= overrides=() text=()
while [ $# -gt 0 ]; do
  case "$1" in
    --corpus)
      [ -f "${2-}" ] || {
        echo "error: no file at '${2-}': give --corpus a text, .jsonl, .csv or .parquet file" >&2
        exit 2
      }
      corpus=$(realpath "$2")
      shift 2 ;;
    --*.*=*) overrides+=("$1"); shift ;;
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --input* | --output* | --tokenizer*)
      echo "error: quickstart.sh chooses $1 itself; see bash scripts/quickstart.sh --help" >&2
      exit 2 ;;
    --?*) # with its values, if any: the programs know which options there are
      text+=("$1")
      shift
      while [ $# -gt 0 ] && [[ $1 != --* ]]; do text+=("$1"); shift; done ;;
    *)
      echo "error: cannot read the argument '$1'; see bash scripts/quickstart.sh --help" >&2
      exit 2 ;;
  esac
done
cd "$(dirname "$0")/.."
. scripts/setup.sh
paragraphs='
import sys
from kantai.errors import run_command
from kantai.preprocessing.documents import has_paragraphs
from kantai.preprocessing.files import find_files
run_command(lambda: print("paragraph" if has_paragraphs(*find_files(sys.argv[1:])) else ""))'

if [ -n "$corpus" ]; then
  name=$(basename "$corpus")
  # Other options of the text make other shards.
  sum=$({ cat -- "$corpus"; [ ${#text[@]} -eq 0 ] || printf '%s\n' "${text[@]}"; } | cksum)
  work=runs/quickstart-${name%.*}-${sum%% *}
else
  work=runs/quickstart
  # Kant's books from the web, or English prose that every Python carries.
  [ -e $work/corpus ] || python scripts/get_corpus.py --output $work/corpus
  corpus=$work/corpus/corpus.txt
fi
# Without --document, the programs take lines of text, and records of everything else.
case " ${text[*]-}" in
  *" --document"* | *" --format"*) ;;
  *) document=$(python -c "$paragraphs" "$corpus")
    [ -z "$document" ] || text+=(--document "$document") ;;
esac

echo "== tokenizer"
[ -e "$work/tokenizer" ] || python scripts/train_tokenizer.py --input "$corpus" \
  --output "$work/tokenizer" --vocab_size 4096 "${text[@]}"
echo "== shards"
[ -e "$work/shards" ] || python scripts/tokenize_corpus.py --input "$corpus" \
  --tokenizer "$work/tokenizer" --output "$work/shards" --held_out 0.1 "${text[@]}"

echo "== training"
settings=(--config configs/quickstart.yaml --run_dir="$work/run"
  --data.shards="$work/shards" --data.tokenizer="$work/tokenizer")
[ ! -e "$work/corpus" ] || settings+=(--evaluation.prompts="$(cat "$work/corpus/prompts.json")")
settings+=("${overrides[@]}")
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
if [ "$gpus" -gt 0 ]; then
  launch=(--config_file configs/accelerate/ddp.yaml --num_processes "$gpus")
else
  launch=(--config_file configs/accelerate/cpu.yaml)
  export DS_ACCELERATOR=cpu # or DeepSpeed warns that it found no GPU
fi
if [ ! -e "$work/model" ]; then
  # Without it, two ranks fight over the cores.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > 2 ? $(nproc) / 2 : 1))}
  python scripts/pretrain.py "${settings[@]}" --check # bad input is named before any rank starts
  accelerate launch "${launch[@]}" scripts/pretrain.py "${settings[@]}"
fi

echo "== evaluation"
once() { # FILE COMMAND...: print a command's output; from the file where it ran before
  if [ ! -e "$1" ]; then "${@:2}" > "$1.partial" && mv "$1.partial" "$1"; fi
  cat "$1"
}
once "$work/evaluation.txt" python scripts/evaluate.py "$work/run"
echo "== export"
[ -e "$work/model" ] || python scripts/export.py "$work/run" --output "$work/model"
echo "== predictions"
if [ -s "$work/run/prompts.txt" ]; then
  once "$work/predictions.txt" \
    python scripts/fill_mask.py "./$work/model" --prompts "$work/run/prompts.txt"
else
  echo "no held-out document has a word to hide: try the last command below with a text of yours"
fi

cat <<EOF

corpus       $corpus
tokenizer    $work/tokenizer
shards       $work/shards
run          $work/run  (checkpoints, metrics.jsonl)
model        $work/model  (load it with transformers.pipeline("fill-mask", "$work/model"))
curves       .venv/bin/tensorboard --logdir $work/run/tensorboard
your turn    .venv/bin/python scripts/fill_mask.py ./$work/model "... <mask> ..."
EOF
