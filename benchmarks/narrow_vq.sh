#!/usr/bin/env bash
# The construction of realsr-x4-s4 at a width that one CPU core can train: VQ-f4, then a U-Net with Swin layers
# in its latent space, 4 steps, MSE and LPIPS, each 2,000 steps or fewer; then grids, upscaling and evaluation.
#   benchmarks/narrow_vq.sh PHOTOS LQ:GT OUT LPIPS_TRUNK
# PHOTOS is a folder to train on, LQ:GT held-out pairs (x4), LPIPS_TRUNK a SqueezeNet of torchvision. Half an
# hour of one core; run again, it continues. docs/training.md has the figures of one run.
set -euo pipefail

[ $# = 4 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
photos="$1" held_out="$2" gt="${2#*:}" out="$3" trunk="$4"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python="$(command -v python3)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export RESSHIFT_CACHE="${RESSHIFT_CACHE:-$out/cache}"
vq_steps="${VQ_STEPS:-600}" steps="${STEPS:-2000}"
# One core, and nothing beside it: several threads that wait for each other crawl on a machine with other work.
bound=(); command -v taskset >/dev/null && bound=(taskset -c "${CORE:-0}")
job() { "${bound[@]}" "$python" "$root/jobs/$1.py" "${@:2}"; }

# A quarter of the channels of VQ-f4, one block a level, an eighth of the codes.
narrow=(vq.ch=32 "vq.ch_mult=[1,1,2]" vq.num_res_blocks=1 vq.n_embed=1024)
both=(
  --set data.crop=random --set data.crop_px=64 --set train.batch_size=4 --set train.micro_batch=4
  --set train.precision=fp32 --set train.ema_decay=0.99 --set train.log_every=20 --set train.keep_last=1
  --set loss.lpips_net=squeeze --set "loss.lpips_trunk=$trunk"
  --set validation.pictures=4 --set validation.best=lpips
)

[ -f "$out/shards/manifest.json" ] || job prepare "$photos" "$out/shards" || [ $? = 3 ]  # 3: some photos cannot be read
job train_autoencoder --preset vq-f4 --data "$out/shards" --out "$out/vq" "${both[@]}" --val "$gt:$gt" \
  "${narrow[@]/#/--set=first_stage.}" --set optim.lr=1e-3 --set optim.lr_end=1e-4 --set optim.warmup_steps=100 \
  --set optim.lr_schedule=cosine --set loss.adversarial=0 --set "train.steps=$vq_steps" \
  --set "train.checkpoint_every=$((vq_steps / 4))" --set "validation.every=$vq_steps"
job train_autoencoder --preset vq-f4 "${narrow[@]/#/--set=first_stage.}" --init "$out/vq/model/model.safetensors" \
  --report "$gt" --out "$out/vq-report"
job train --preset realsr-x4-s4 --data "$out/shards" --out "$out/sr" "${both[@]}" --val "$held_out" \
  "${narrow[@]/#/--set=model.first_stage.}" --set "train.first_stage_weights=$out/vq/model/model.safetensors" \
  --set model.unet.image_size=16 --set model.unet.lq_size=16 --set model.unet.model_channels=32 \
  --set "model.unet.channel_mult=[1,2,2]" --set model.unet.num_res_blocks=1 --set "model.unet.attention_resolutions=[16,8]" \
  --set model.unet.swin_embed_dim=64 --set optim.lr=5e-4 --set optim.lr_end=2e-5 --set optim.warmup_steps=100 \
  --set "train.steps=$steps" --set "train.checkpoint_every=$((steps / 4))" --set "validation.every=$((steps / 2))"
job upscale "${held_out%%:*}" "$out/upscaled" --model "$out/sr/model"
job evaluate --model "$out/sr/model" --data "held_out=$held_out" --out "$out/report" --lpips-trunk "$trunk" --replicas 1

"$python" - "$out" <<'TABLE'
import sys
from pipelines.training.log import read_lines
for name in ("vq", "sr"):
    lines = read_lines(f"{sys.argv[1]}/{name}")
    size = max(1, len(lines) // 10)
    terms = [term for term in ("loss", "mse", "l1", "lpips", "codebook") if term in lines[0]]
    print(f"{name}: mean of", *terms, "up to step")
    for i in range(0, len(lines) - size + 1, size):
        part = lines[i : i + size]
        print(f"  {part[-1]['step']:5d}", *(f"{sum(line[term] for line in part) / len(part):.4f}" for term in terms))
TABLE
echo "grids: $out/vq/samples and $out/sr/samples; report: $out/report/report.html"
