# Sourced by deploy/lab, tests/run and deploy/rocksdb: where compiled things are kept.
# Everything lives outside the clone, so that a fresh clone finds it again.
# Override with HOLDFAST_CACHE (all of it) or CARGO_TARGET_DIR (cargo's part).
: "${HOLDFAST_CACHE:=${XDG_CACHE_HOME:-$HOME/.cache}/holdfast}"
: "${CARGO_TARGET_DIR:=$HOLDFAST_CACHE/target}"
export HOLDFAST_CACHE CARGO_TARGET_DIR
