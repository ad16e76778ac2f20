#!/usr/bin/env bash
# The source's recipe on six 24 GB cards: Qwen-VL, LAION's captions rewritten, SFT, QA, two rounds.
#
#     IMAGES=photos MORE=more-photos TEST=test-photos bash runs/source.sh
#
# Paths are relative to the root of the repository.
# The same command resumes: what is there is skipped, and every stage continues where it was
# stopped. To do a step again, delete what it wrote and what came of it.
#
# No run at full size has been made: disk, memory and time of each step are estimates. They assume
# six RTX 3090 at half of their 71 TFLOP/s in bf16 and at 80 % of 936 GB/s; 49 TFLOP for an image's
# six views (ViT 25, language model 24), three times that to train both towers with recomputed
# blocks; 12,000 captions; 9,000 images in each of IMAGES and MORE, 8 captions each; a tool LLM of 7
# billion parameters at 500 tokens/s in batches of 16. In all two days and 70 GB of disk (estimated)
# besides IMAGES and MORE. A server (TOOL=http://localhost:8000/v1, TOOL_FLAGS="--tool-model NAME")
# answers several times faster.
#
# Licences: LAION's captions cc0 (https://huggingface.co/datasets/laion/gpt4v-dataset), the images
# behind its links their owners'. Qwen-VL: the Tongyi Qianwen licence agreement, which forbids
# improving another large language model with its output. Qwen2.5-7B-Instruct: Apache-2.0.
set -euo pipefail
cd "$(dirname "$0")/.."

BASE=${BASE:-Qwen/Qwen-VL}
GPUS=${GPUS:-6}
DATA=${DATA:-data}                      # what is downloaded
OUT=${OUT:-out/source}                  # what the run writes
IMAGES=${IMAGES:?a folder of images without captions, for round one}
MORE=${MORE:-$IMAGES}                   # for round two; better other images than those of round one
TEST=${TEST:?a folder of images to compare the rounds on, used for nothing else}
QA_IMAGES=${QA_IMAGES:-2000}            # captions that become questions
TOOL=${TOOL:-hf:Qwen/Qwen2.5-7B-Instruct}
TOOL_FLAGS=${TOOL_FLAGS:---tool-batch 16}
SFT_FLAGS=${SFT_FLAGS:-}                # further flags of each stage; words are split at blanks
QA_FLAGS=${QA_FLAGS:-}
GOLDEN_FLAGS=${GOLDEN_FLAGS:-}
DPO_FLAGS=${DPO_FLAGS:-}
CAPTION_FLAGS=${CAPTION_FLAGS:-}
TOOL_FLAGS="--tool $TOOL --tool-cache $OUT/tool-cache $TOOL_FLAGS"
mkdir -p "$DATA" "$OUT"

# ---- data: LAION's captions by GPT-4V. Links only: an image that is gone is left out.
# disk 10 MB of links, 3 GB of images at 1024 pixels; 1 hour (estimated). img2dataset: pip install
# img2dataset. `.complete` marks a whole download; make that file if you have the data already.
[ -e "$DATA/gpt4v-links/.complete" ] || {
    hf download laion/gpt4v-dataset --repo-type dataset --local-dir "$DATA/gpt4v-links"
    touch "$DATA/gpt4v-links/.complete"
}
[ -e "$DATA/gpt4v/.complete" ] || {
    img2dataset --url_list "$DATA/gpt4v-links/data" --input_format parquet --url_col link \
        --caption_col caption --output_format files --resize_mode keep_ratio \
        --resize_only_if_bigger True --image_size 1024 --output_folder "$DATA/gpt4v"
    touch "$DATA/gpt4v/.complete"
}

# ---- captions in shorthand. An answer that the tool LLM fails to give is an error row, and exit
# code 1; the file is there all the same, and later stages leave such rows out.
# disk 15 GB for the tool LLM; memory 18 GB of one card; 1.5 hours (estimated)
[ -f "$OUT/captions.jsonl" ] ||
    python tool_llm.py rewrite "$DATA/gpt4v" --out "$OUT/captions.jsonl" $TOOL_FLAGS ||
    [ -f "$OUT/captions.jsonl" ]

# ---- SFT: a captioner
# disk 19 GB for the base, 6 GB in out/sft; memory 22 GB of each card; 7 hours (estimated)
[ -f "$OUT/sft/adapters.json" ] ||
    torchrun --nproc_per_node "$GPUS" sft.py --base "$BASE" --data "$OUT/captions.jsonl" \
        --out "$OUT/sft" $SFT_FLAGS

# ---- questions for the QA adapter, half of them near misses. The source has "around 2K images".
# memory 18 GB of one card; half an hour (estimated)
[ -f "$OUT/qa-captions.jsonl" ] || {
    head -n "$QA_IMAGES" "$OUT/captions.jsonl" > "$OUT/qa-captions.jsonl.part"
    mv "$OUT/qa-captions.jsonl.part" "$OUT/qa-captions.jsonl"
}
[ -f "$OUT/questions.jsonl" ] ||
    python tool_llm.py triplets "$OUT/qa-captions.jsonl" --out "$OUT/questions.jsonl" \
        $TOOL_FLAGS || [ -f "$OUT/questions.jsonl" ]

# ---- round one: a QA adapter
# disk 5 GB; memory 22 GB of each card; 8 hours with ten questions to an image (estimated)
[ -f "$OUT/qa/adapters.json" ] ||
    torchrun --nproc_per_node "$GPUS" qa_adapter.py --init "$OUT/sft" --out "$OUT/qa" \
        --data "$OUT/questions.jsonl" $QA_FLAGS

# ---- golden captions. index.html, the page to look at, is written last.
# disk 1 GB; memory 23 GB of each card, captioner and tool LLM one after the other; sampling 2.5,
# combining 4, verifying 1, composing .5 hours (estimated)
[ -f "$OUT/golden/index.html" ] ||
    torchrun --nproc_per_node "$GPUS" golden.py --images "$IMAGES" --captioner "$OUT/sft" \
        --qa "$OUT/qa" --out "$OUT/golden" $TOOL_FLAGS $GOLDEN_FLAGS

# ---- DPO + cross entropy: the next captioner
# disk 6 GB; memory 22.5 GB of each card; 3 hours (estimated)
[ -f "$OUT/dpo/adapters.json" ] ||
    torchrun --nproc_per_node "$GPUS" dpo.py --init "$OUT/sft" --data "$OUT/golden/golden.jsonl" \
        --out "$OUT/dpo" $DPO_FLAGS

# ---- round two, the one that the source published: the same three steps from the new captioner
# disk 12 GB; memory as before; 8, 8 and 3 hours (estimated)
[ -f "$OUT/qa-2/adapters.json" ] ||
    torchrun --nproc_per_node "$GPUS" qa_adapter.py --init "$OUT/dpo" --out "$OUT/qa-2" \
        --data "$OUT/questions.jsonl" $QA_FLAGS
[ -f "$OUT/golden-2/index.html" ] ||
    torchrun --nproc_per_node "$GPUS" golden.py --images "$MORE" --captioner "$OUT/dpo" \
        --qa "$OUT/qa-2" --out "$OUT/golden-2" $TOOL_FLAGS $GOLDEN_FLAGS
[ -f "$OUT/dpo-2/adapters.json" ] ||
    torchrun --nproc_per_node "$GPUS" dpo.py --init "$OUT/dpo" \
        --data "$OUT/golden-2/golden.jsonl" --out "$OUT/dpo-2" $DPO_FLAGS

# ---- captions of the test images after each stage, to choose the best round by: the source's third
# round was worse than its second. memory 22 GB of one card; 5 seconds an image (estimated)
for stage in sft dpo dpo-2; do
    [ -f "$OUT/test-$stage.jsonl" ] || {
        python caption.py "$TEST" --adapters "$OUT/$stage" --jsonl $CAPTION_FLAGS \
            > "$OUT/test-$stage.jsonl.part"
        mv "$OUT/test-$stage.jsonl.part" "$OUT/test-$stage.jsonl"
    }
done
