#!/usr/bin/env bash
# Turns downloaded DCLM shards (folders of .jsonl.zst) into ten shuffled data sets, dclm_01_text_document to
# dclm_10_text_document. After an interruption, run it again: it continues where it stopped.
set -euo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: scripts/prepare_dclm.sh SOURCE TARGET TOKENIZER [option of `megatron-mtp prepare` ...]

  SOURCE     folder of the downloaded .jsonl.zst shards; subfolders are searched
  TARGET     folder for the data sets; needs about as much space again while it works
  TOKENIZER  tokenizer.json or a folder with one, *.model, *.tiktoken, or "bytes"

environment: SEED (1234), SHARDS (10), MEGATRON_MTP (megatron-mtp)
example:     scripts/prepare_dclm.sh ~/dclm/raw ~/dclm/tokens ~/models/qwen3 --workers 64 --memory-mib 16384
TEXT
    exit 2
}

[[ $# -ge 3 ]] || usage
source_folder=$1 target_folder=$2 tokenizer=$3
shift 3

# MEGATRON_MTP may hold a command of several words, such as "python -m megatron_mtp".
read -r -a command <<<"${MEGATRON_MTP:-megatron-mtp}"

"${command[@]}" prepare "$source_folder" \
    --output "$target_folder/dclm" \
    --tokenizer "$tokenizer" \
    --shards "${SHARDS:-10}" \
    --shuffle "${SEED:-1234}" \
    "$@"
