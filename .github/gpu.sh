#!/usr/bin/env bash
# The commands among measure.py's steps: bash .github/gpu.sh STEP OUT [DATA] [GOLDEN]
# OUT is a folder, DATA has photographs in DATA/train/CLASS and DATA/val/CLASS.
set -e
step=$1 out=$2 data=$3 golden=$4
python() { command "${PYTHON:-python3}" "$@"; }

learn() {  # learn NAME FLAG ...: a model with 256 tokens and 38 million parameters
    python rar.py train --data "$data" --out "$out/$1" --model small --image-size 64 \
        --grid-size 16 --codebook-size 1024 --width 512 --depth 8 --mlp-width 2048 --dropout 0.1 \
        --lr 0.001 --steps 1500 "${@:2}"
}

case $step in
tests) unset TQDM_DISABLE && python -m pytest -q ;;
shapes) time python rar.py train --out "$out/shapes" ;;
sample-*)  # RAR-B with random weights, pixels included
    python - "$out/random" <<'END'
import sys, rar, tokenizer
model, kind = rar.RAR(rar.PRESETS["RAR-B"]), tokenizer.MaskGITVQGAN()
rar.write_tensors(sys.argv[1] + "/weights.pt", model.state_dict())
rar.write_tensors(sys.argv[1] + "/tokenizer.pt", kind.state_dict())
END
    time python rar.py sample --weights "$out/random" --count "${COUNT:-1000}" \
        --precision "${step#sample-}" --out "$out/$step.npz" ;;
scores)  # The two should agree to 1e-4. measure.py has written weights and noise.
    for device in cpu cuda; do
        python fid.py "$golden/images8.npz" "$out/noise.npy" --weights "$out/inception.pt" \
            --device $device
    done ;;
photographs)  # the preset as on a CPU, the same at 64x64, and a larger model
    time python rar.py train --data "$data" --out "$out/small" --model small
    python .github/photos.py "$data" "$out/small"
    time python rar.py train --data "$data" --out "$out/small-64" --model small --image-size 64 \
        --grid-size 16
    python .github/photos.py "$data" "$out/small-64"
    time learn large --anneal 0.25 0.5
    python .github/photos.py "$data" "$out/large" ;;
esac
