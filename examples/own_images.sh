#!/usr/bin/env bash
# From a folder of photographs to a model, its figures and a folder of samples.
#
#   bash examples/own_images.sh MY_PHOTOS runs/mine 2
#
# The folder may have one sub-folder per class. The last argument is the hours of training; repeat the command after an
# interruption, or with more hours to train further.
set -euo pipefail
photos=${1:?"give a folder of photographs"}
run=${2:-runs/photos}
hours=${3:-2}

looc-ldm train photos "$photos" --output "$run" --hours "$hours"
looc-ldm evaluate reconstruction "$run/autoencoder/model" --data "$photos" --images 200
looc-ldm analyze "$run/autoencoder/model" --data "$photos" --images 200 --output "$run/analysis"
looc-ldm sample "$run/diffusion/pipeline" --images 8 --output "$run/more_samples"
echo "Open $run/report.html and $run/analysis/analysis.html."
