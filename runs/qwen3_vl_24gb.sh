#!/usr/bin/env bash
# Qwen3-VL-4B on one 24 GB card: DOCCI's captions for SFT and, as questions, for QA, with VSR's
# statements; NaturalBench as a held-out test of the gate; golden captions of unlabelled images; two
# rounds; CAPEval before and after.
#
#     bash runs/qwen3_vl_24gb.sh
#
# Paths are relative to the root of the repository.
# The same command resumes: what is there is skipped, and every stage continues where it was
# stopped. To do a step again, delete what it wrote and what came of it.
#
# No run at full size has been made: disk, memory and time of each step are estimates. They assume
# an RTX 3090 at half of its 71 TFLOP/s in bf16; Qwen3-VL-4B (4.4 billion parameters, 8.9 GB as
# bf16) with six views of 196 tokens, so 12 TFLOP for an image (ViT 3, language model 9), three
# times that to train both towers with recomputed blocks; 8 samples of 2,500 images a round; a tool
# LLM of 7 billion parameters at 500 tokens/s in batches of 16. In all two days and 60 GB of disk
# (estimated). Almost half of the time is the tool LLM, and a server
# (TOOL=http://localhost:8000/v1, TOOL_FLAGS="--tool-model NAME") answers several times faster.
#
# Licences: Qwen3-VL-4B-Instruct and Qwen2.5-7B-Instruct, Apache-2.0. DOCCI, CC BY 4.0
# (https://google.github.io/docci). VSR, CC BY 4.0, on images of COCO, whose licences are their own
# (https://huggingface.co/datasets/cambridgeltl/vsr_random). NaturalBench, Apache-2.0
# (https://huggingface.co/datasets/BaiqiL/NaturalBench), and CAPEval, Apache-2.0
# (https://huggingface.co/datasets/LiuzhipengUCAS/CAPEval): both judge and are never trained on.
set -euo pipefail
cd "$(dirname "$0")/.."

BASE=${BASE:-Qwen/Qwen3-VL-4B-Instruct}
DATA=${DATA:-data}                      # what is downloaded
OUT=${OUT:-out/qwen3-vl}                # what the run writes
IMAGES=${IMAGES:-}                      # unlabelled images for round one; left out, half of DOCCI's
MORE=${MORE:-}                          # test images. For round two; left out, the other half
QA_IMAGES=${QA_IMAGES:-1000}            # captions of DOCCI that become questions
TOOL=${TOOL:-hf:Qwen/Qwen2.5-7B-Instruct}
TOOL_FLAGS=${TOOL_FLAGS:---tool-batch 16}
JUDGE=${JUDGE:-$TOOL}                   # of CAPEval; the published figures are by Qwen2.5-72B
JUDGE_FLAGS=${JUDGE_FLAGS:-$TOOL_FLAGS}
SFT_FLAGS=${SFT_FLAGS:-}                # further flags of each stage; words are split at blanks
QA_FLAGS=${QA_FLAGS:---epochs 1}
GOLDEN_FLAGS=${GOLDEN_FLAGS:-}
DPO_FLAGS=${DPO_FLAGS:-}
CAPTION_FLAGS=${CAPTION_FLAGS:-}
JUDGE_FLAGS="--tool $JUDGE --tool-cache $OUT/tool-cache $JUDGE_FLAGS"
TOOL_FLAGS="--tool $TOOL --tool-cache $OUT/tool-cache $TOOL_FLAGS"
mkdir -p "$DATA" "$OUT"

# ---- data. `.complete` marks a whole download; make that file if you have the data already.
# DOCCI from its publisher, since the Hub's google/docci is a script that fetches the same two files
# disk 8 GB packed, 8 GB unpacked; an hour at 20 Mbit/s (estimated)
[ -e "$DATA/docci/.complete" ] || {
    for file in docci_descriptions.jsonlines docci_images.tar.gz; do
        wget --continue --directory-prefix "$DATA/docci" \
            "https://storage.googleapis.com/docci/data/$file"
    done
    touch "$DATA/docci/.complete"
}
# VSR: statements from the Hub, images one by one from COCO's server; disk 1 GB; half an hour
# (estimated)
[ -e "$DATA/vsr/.complete" ] || {
    hf download cambridgeltl/vsr_random --repo-type dataset --local-dir "$DATA/vsr"
    grep --only-matching 'http://images.cocodataset.org/[^"]*' "$DATA/vsr/train.jsonl" |
        sort --unique |
        wget --quiet --continue --directory-prefix "$DATA/vsr/images" --input-file -
    touch "$DATA/vsr/.complete"
}
# disk 1.2 GB, and 1.2 GB again as images (estimated)
[ -e "$DATA/naturalbench/.complete" ] || {
    hf download BaiqiL/NaturalBench --repo-type dataset --include "data/*.parquet" \
        --local-dir "$DATA/naturalbench"
    touch "$DATA/naturalbench/.complete"
}
# disk 1 GB (estimated)
[ -e "$DATA/capeval/.complete" ] || {
    hf download LiuzhipengUCAS/CAPEval --repo-type dataset --local-dir "$DATA/capeval"
    touch "$DATA/capeval/.complete"
}

# ---- as rows. pyarrow, which reads NaturalBench: pip install pyarrow. Minutes (estimated)
[ -e "$DATA/docci/images/.complete" ] || {
    tar --extract --gzip --file "$DATA/docci/docci_images.tar.gz" --directory "$DATA/docci"
    touch "$DATA/docci/images/.complete"
}
[ -f "$OUT/docci.jsonl" ] || python runs/prepare.py docci "$DATA/docci" --out "$OUT/docci.jsonl"
[ -f "$OUT/vsr.jsonl" ] || python runs/prepare.py vsr "$DATA/vsr" --out "$OUT/vsr.jsonl"
[ -f "$OUT/naturalbench.jsonl" ] ||
    python runs/prepare.py naturalbench "$DATA/naturalbench" --out "$OUT/naturalbench.jsonl"
# unlabelled images: DOCCI's test images without their captions, even numbers and odd ones, as links
[ -e "$DATA/unlabelled/.complete" ] || {
    mkdir -p "$DATA/unlabelled/even" "$DATA/unlabelled/odd"
    find "$DATA/docci/images" -name 'test_*[02468].jpg' -exec ln -f -t "$DATA/unlabelled/even" {} +
    find "$DATA/docci/images" -name 'test_*[13579].jpg' -exec ln -f -t "$DATA/unlabelled/odd" {} +
    touch "$DATA/unlabelled/.complete"
}
IMAGES=${IMAGES:-$DATA/unlabelled/even}
MORE=${MORE:-$DATA/unlabelled/odd}

# ---- CAPEval: captions of its images, and what a judge that sees only them makes of its checklist.
# The submission can be given to CAPEval's own code, for figures next to the published ones.
# memory 14 GB, then 18 GB; 10 minutes of captions (base: half an hour, up to 16,000 tokens an
# image), 15 of the judge, at each call (estimated)
capeval() {     # capeval NAME FLAG…: the flags say to caption.py which captioner it is
    [ -f "$OUT/capeval-$1.jsonl" ] || {
        python caption.py "$DATA/capeval/image" "${@:2}" --jsonl $CAPTION_FLAGS \
            > "$OUT/capeval-$1.jsonl.part"
        mv "$OUT/capeval-$1.jsonl.part" "$OUT/capeval-$1.jsonl"
    }
    [ -f "$OUT/capeval-$1.json" ] ||
        python evaluate.py "$OUT/capeval-$1.jsonl" --checklist "$DATA/capeval/checklist.jsonl" \
            --json "$OUT/capeval-$1.json" --submission "$OUT/capeval-$1-submission.json" \
            $JUDGE_FLAGS || [ -f "$OUT/capeval-$1.json" ]
}
# before: the base in the way that the published 60.2 of coverage and 81.1 of precision were made,
# the whole image at the model's own resolution and CAPEval's prompt
capeval base --base "$BASE" --adapters none --views one \
    --caption-prompt "Analyze the image in a comprehensive and detailed manner."

# ---- captions in shorthand. An answer that the tool LLM fails to give is an error row, and exit
# code 1; the file is there all the same, and later stages leave such rows out.
# disk 15 GB for the tool LLM; memory 18 GB; 1.5 hours (estimated)
[ -f "$OUT/captions.jsonl" ] ||
    python tool_llm.py rewrite "$OUT/docci.jsonl" --out "$OUT/captions.jsonl" $TOOL_FLAGS ||
    [ -f "$OUT/captions.jsonl" ]

# ---- SFT: a captioner
# disk 9 GB for the base, 2 GB in out/sft; memory 13 GB; 9 hours (estimated)
[ -f "$OUT/sft/adapters.json" ] ||
    python sft.py --base "$BASE" --data "$OUT/captions.jsonl" --out "$OUT/sft" $SFT_FLAGS
capeval sft --adapters "$OUT/sft"

# ---- questions for the QA adapter: from DOCCI's descriptions, half of them near misses, and VSR's
# memory 18 GB; half an hour (estimated)
[ -f "$OUT/docci-qa.jsonl" ] || {
    head -n "$QA_IMAGES" "$OUT/docci.jsonl" > "$OUT/docci-qa.jsonl.part"
    mv "$OUT/docci-qa.jsonl.part" "$OUT/docci-qa.jsonl"
}
[ -f "$OUT/docci-questions.jsonl" ] ||
    python tool_llm.py triplets "$OUT/docci-qa.jsonl" --out "$OUT/docci-questions.jsonl" \
        $TOOL_FLAGS || [ -f "$OUT/docci-questions.jsonl" ]
[ -f "$OUT/questions.jsonl" ] || {
    cat "$OUT/docci-questions.jsonl" "$OUT/vsr.jsonl" > "$OUT/questions.jsonl.part"
    mv "$OUT/questions.jsonl.part" "$OUT/questions.jsonl"
}

# ---- round one: a QA adapter, and how many of NaturalBench's questions it has right
# disk 2 GB; memory 13 GB; 4.5 hours with twelve questions to an image (estimated). Testing: half an
# hour (estimated)
[ -f "$OUT/qa/adapters.json" ] ||
    python qa_adapter.py --init "$OUT/sft" --out "$OUT/qa" --data "$OUT/questions.jsonl" $QA_FLAGS
[ -f "$OUT/naturalbench-1.txt" ] || {
    python qa_adapter.py --init "$OUT/sft" --out "$OUT/qa" --test "$OUT/naturalbench.jsonl" |
        tee "$OUT/naturalbench-1.txt.part"
    mv "$OUT/naturalbench-1.txt.part" "$OUT/naturalbench-1.txt"
}

# ---- golden captions. index.html, the page to look at, is written last.
# disk 1 GB; memory 18 GB, captioner and tool LLM one after the other; sampling 1.5, combining 7,
# verifying .5, composing 1 hours (estimated)
[ -f "$OUT/golden/index.html" ] ||
    python golden.py --images "$IMAGES" --captioner "$OUT/sft" --qa "$OUT/qa" \
        --out "$OUT/golden" $TOOL_FLAGS $GOLDEN_FLAGS

# ---- DPO + cross entropy: the next captioner
# disk 2 GB; memory 14 GB; 1.5 hours (estimated)
[ -f "$OUT/dpo/adapters.json" ] ||
    python dpo.py --init "$OUT/sft" --data "$OUT/golden/golden.jsonl" --out "$OUT/dpo" $DPO_FLAGS
capeval dpo --adapters "$OUT/dpo"

# ---- round two: the same steps from the new captioner
# disk 5 GB; memory as before; 5, 10 and 1.5 hours (estimated)
[ -f "$OUT/qa-2/adapters.json" ] ||
    python qa_adapter.py --init "$OUT/dpo" --out "$OUT/qa-2" --data "$OUT/questions.jsonl" \
        $QA_FLAGS
[ -f "$OUT/naturalbench-2.txt" ] || {
    python qa_adapter.py --init "$OUT/dpo" --out "$OUT/qa-2" --test "$OUT/naturalbench.jsonl" |
        tee "$OUT/naturalbench-2.txt.part"
    mv "$OUT/naturalbench-2.txt.part" "$OUT/naturalbench-2.txt"
}
[ -f "$OUT/golden-2/index.html" ] ||
    python golden.py --images "$MORE" --captioner "$OUT/dpo" --qa "$OUT/qa-2" \
        --out "$OUT/golden-2" $TOOL_FLAGS $GOLDEN_FLAGS
[ -f "$OUT/dpo-2/adapters.json" ] ||
    python dpo.py --init "$OUT/dpo" --data "$OUT/golden-2/golden.jsonl" --out "$OUT/dpo-2" \
        $DPO_FLAGS
capeval dpo-2 --adapters "$OUT/dpo-2"
