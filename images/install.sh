#!/bin/sh
# Make the environment /opt/modelmill in a builder stage, from the wheel and the lock.
#
#   install.sh lock|base REQUIREMENT...
#
# lock: every distribution comes from the lock. base: torch, and numpy which its extensions were compiled against, stay
# those of the base image, whatever their versions; pip refuses the build when the wheel's ranges do not admit them.
set -eu

torch=$1
shift
target=/opt/modelmill
lock=/tmp/locked.txt

if [ "$torch" = base ]; then
    python3 -m venv --without-pip --system-site-packages "$target"
    grep -viE '^(torch|numpy|triton|nvidia-[a-z0-9-]+)==' /build/constraints.txt > "$lock"
    for name in torch numpy; do
        python3 -c "import importlib.metadata as m; print('$name==' + m.version('$name'))" >> "$lock"
    done
else
    python3 -m venv --without-pip "$target"
    cp /build/constraints.txt "$lock"
fi

# The runtime has no pip: nothing installs packages into a running step.
install() {
    python3 -m pip --python "$target/bin/python3" install --no-cache-dir --no-compile -q --disable-pip-version-check \
        --root-user-action=ignore -c "$lock" "$@"
}
install "$@"
case " $* " in
    # A step needs kfp's executor, which imports nothing but kfp itself; kfp's own dependencies pin requests and
    # urllib3 to one version each and would pin them for everything else in the image.
    *modelmill*) install --no-deps kfp ;;
esac

site=$("$target/bin/python3" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
find "$site" -type d -name tests -prune -exec rm -rf {} +
if [ "$torch" = lock ]; then  # without a device: torch's own test programs, and CUDA kernels nothing can load
    rm -rf "$site/torch/test"
    find "$site" -name 'libbitsandbytes_cuda*' -delete
fi
# Compiled by content, not by time: the same bytes in every build, and valid after file times were set to the commit's.
# Some packages carry templates that are no Python; compileall says so and goes on.
"$target/bin/python3" -m compileall -qq -j 0 --invalidation-mode unchecked-hash "$site" || true
"$target/bin/python3" /build/sbom.py "$target/sbom.cdx.json"
