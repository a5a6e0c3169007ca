#!/bin/bash
# A TPU slice by gcloud alone, spot or not; a run that is stopped goes on, on a new slice if the old one was pre-empted:
#   IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/sso_jax:tpu SPOT=1 deploy/tpu_vm.sh my-tpu us-east5-b v6e-16 v2-alpha-tpuv6e \
#       --config configs/qwen2_7b_instruct.yaml --run.directory gs://BUCKET/runs/mine
# IMAGE is the image of the Dockerfile with DEVICE=tpu, pushed to Artifact Registry; the slice's service account must be able to
# read it and to write the bucket. HF_TOKEN, if set, is handed on for gated models: in the remote command, never in a file.
# Ctrl-C stops the run cleanly, on all hosts; the same command goes on. The slice is kept at the end:
#   gcloud compute tpus tpu-vm delete my-tpu --zone us-east5-b
# How far this was checked: shellcheck; its gcloud flags against the help of the Google Cloud CLI; tests/deploy/test_scripts.py runs it
# with a stand-in for gcloud that pre-empts, stops and fails. No TPU was at hand.
set -uo pipefail
if [ $# -lt 5 ]; then
    echo "usage: IMAGE=... [SPOT=1] $0 NAME ZONE ACCELERATOR RUNTIME_VERSION --config ... --run.directory gs://..." >&2
    exit 2
fi
name=$1 zone=$2 accelerator=$3 version=$4
shift 4
image=${IMAGE:?the image of the Dockerfile, built with DEVICE=tpu}
tpu=(gcloud compute tpus tpu-vm)
at=(--zone "$zone")

state() {
    "${tpu[@]}" describe "$name" "${at[@]}" --format='value(state)' 2>/dev/null
}

# Creates the slice if there is none, and replaces one that was pre-empted; tries again while there is no capacity.
ensure_slice() {
    while [ "$(state)" != READY ]; do
        case "$(state)" in
            PREEMPTED | TERMINATED | STOPPED) "${tpu[@]}" delete "$name" "${at[@]}" --quiet ;;
            *) : ;;
        esac
        "${tpu[@]}" create "$name" "${at[@]}" --accelerator-type "$accelerator" --version "$version" \
            --scopes cloud-platform ${SPOT:+--spot} ||
            sleep "${RETRY_SECONDS:-60}"
    done
}

# Runs a command on every host of the slice; exits with the first status that is not 0.
on_all_hosts() {
    "${tpu[@]}" ssh "$name" "${at[@]}" --worker=all --command "$1"
}

stopping='' running=''
stop() {
    if [ -n "$stopping" ] || [ -z "$running" ]; then
        exit 130
    fi
    stopping=1
    echo "stopping on all hosts after this step" >&2
    on_all_hosts "sudo docker stop --time 600 sso"
}
trap stop INT TERM

printf -v arguments ' %q' "$@"
setup="sudo docker rm --force sso >/dev/null 2>&1; sudo gcloud auth configure-docker --quiet ${image%%/*} >/dev/null 2>&1"
train="sudo ${HF_TOKEN:+HF_TOKEN=$(printf %q "$HF_TOKEN") }docker run --rm --init --name sso --privileged --net host --user 0"
train+=" ${HF_TOKEN:+--env HF_TOKEN }$(printf %q "$image") python train.py --checkpoint.stop_seconds 580$arguments --hosts.initialize true"
while true; do
    ensure_slice
    on_all_hosts "$setup; $train" &
    running=$!
    wait "$running"
    status=$?
    # A trapped signal ends the first wait; the second one has the status of the run itself.
    if [ -n "$stopping" ]; then
        wait "$running"
        exit $?
    fi
    running=''
    if [ "$status" -eq 0 ]; then
        exit 0
    elif [ "$status" -eq 75 ]; then
        echo "stopped by a signal; going on" >&2
    elif [ "$(state)" != READY ]; then
        echo "the slice is gone; going on with another" >&2
    else
        exit "$status"
    fi
done
