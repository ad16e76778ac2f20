#!/usr/bin/env bash
# Images alone, on one 24 GB card: a base that follows instructions captions them, answers questions
# about its captions, and learns from the statements that it confirms. Two rounds.
#
#     IMAGES=photos MORE=more-photos TEST=test-photos bash runs/no_data.sh
#
# Paths are relative to the root of the repository.
# The same command resumes: what is there is skipped, and every stage continues where it was
# stopped. To do a step again, delete what it wrote and what came of it.
#
# No run at full size has been made: disk, memory and time of each step are estimates. They assume
# an RTX 3090 at half of its 71 TFLOP/s in bf16; Qwen3-VL-4B (4.4 billion parameters, 8.9 GB as
# bf16) with six views of 196 tokens, so 12 TFLOP for an image (ViT 3, language model 9), three
# times that to train both towers with recomputed blocks; 2,500 images in each of IMAGES and MORE, 8
# captions each; a tool LLM of 7 billion parameters at 500 tokens/s in batches of 16. In all 23
# hours and 30 GB of disk (estimated) besides the images. Most of the time is the tool LLM, and a
# server (TOOL=http://localhost:8000/v1, TOOL_FLAGS="--tool-model NAME") answers several times
# faster.
#
# Licences: Qwen3-VL-4B-Instruct and Qwen2.5-7B-Instruct, Apache-2.0.
set -euo pipefail
cd "$(dirname "$0")/.."

BASE=${BASE:-Qwen/Qwen3-VL-4B-Instruct}
OUT=${OUT:-out/no-data}                 # what the run writes
IMAGES=${IMAGES:?a folder of images, for round one}
MORE=${MORE:-$IMAGES}                   # for round two; better other images than those of round one
TEST=${TEST:?a folder of images to compare the rounds on, used for nothing else}
PROMPT=${PROMPT:-}                      # what the base is asked for a caption, if not its default
TOOL=${TOOL:-hf:Qwen/Qwen2.5-7B-Instruct}
TOOL_FLAGS=${TOOL_FLAGS:---tool-batch 16}
GOLDEN_FLAGS=${GOLDEN_FLAGS:-}          # further flags of each stage; words are split at blanks
DPO_FLAGS=${DPO_FLAGS:-}
CAPTION_FLAGS=${CAPTION_FLAGS:-}
TOOL_FLAGS="--tool $TOOL --tool-cache $OUT/tool-cache $TOOL_FLAGS"
mkdir -p "$OUT"

# ---- round one: golden captions by the bare base. index.html, the page to look at, is last.
# disk 9 GB for the base, 15 GB for the tool LLM; memory 18 GB; sampling 1.5, combining 7, verifying
# .5, composing 1 hours (estimated)
[ -f "$OUT/golden/index.html" ] ||
    python golden.py --images "$IMAGES" --captioner none --qa none --base "$BASE" \
        ${PROMPT:+--caption-prompt "$PROMPT"} --out "$OUT/golden" $TOOL_FLAGS $GOLDEN_FLAGS

# ---- DPO + cross entropy on fresh adapters; the reference is the bare base, asked as above
# disk 2 GB; memory 14 GB; 1.5 hours (estimated)
[ -f "$OUT/dpo/adapters.json" ] ||
    python dpo.py --init none --base "$BASE" --data "$OUT/golden/golden.jsonl" --out "$OUT/dpo" \
        $DPO_FLAGS

# ---- round two: the new captioner; the bare base is still the judge
# disk 2 GB; memory 18 GB; 10 and 1.5 hours (estimated)
[ -f "$OUT/golden-2/index.html" ] ||
    python golden.py --images "$MORE" --captioner "$OUT/dpo" --qa none --out "$OUT/golden-2" \
        $TOOL_FLAGS $GOLDEN_FLAGS
[ -f "$OUT/dpo-2/adapters.json" ] ||
    python dpo.py --init "$OUT/dpo" --data "$OUT/golden-2/golden.jsonl" --out "$OUT/dpo-2" \
        $DPO_FLAGS

# ---- captions of the test images before and after, to choose the best round by
# memory 14 GB; 2 seconds an image (estimated)
[ -f "$OUT/test-base.jsonl" ] || {
    python caption.py "$TEST" --base "$BASE" --adapters none \
        ${PROMPT:+--caption-prompt "$PROMPT"} --jsonl $CAPTION_FLAGS > "$OUT/test-base.jsonl.part"
    mv "$OUT/test-base.jsonl.part" "$OUT/test-base.jsonl"
}
for stage in dpo dpo-2; do
    [ -f "$OUT/test-$stage.jsonl" ] || {
        python caption.py "$TEST" --adapters "$OUT/$stage" --jsonl $CAPTION_FLAGS \
            > "$OUT/test-$stage.jsonl.part"
        mv "$OUT/test-$stage.jsonl.part" "$OUT/test-$stage.jsonl"
    }
done
