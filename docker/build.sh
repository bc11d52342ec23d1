#!/bin/sh
# Build the images with the engine that is there: docker/build.sh [service|cpu|cuda|npu]… (make images)
#
# ENGINE chooses one of docker, podman, buildah; OPTIONS are more options of its build, like --build-arg BASE=…;
# TAG is the tag, by default the project's version.
set -eu
cd "$(dirname "$0")/.."
tag=${TAG:-$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)}
if [ -z "${ENGINE:-}" ]; then
    for ENGINE in docker podman buildah none; do
        command -v "$ENGINE" >/dev/null 2>&1 && break
    done
fi
case $ENGINE in
docker) build="docker build" ;;
# Their own format, OCI's, has no health checks.
podman | buildah) build="$ENGINE build --format docker" ;;
*)
    echo "error: images need docker, podman or buildah, and none is installed" >&2
    exit 1
    ;;
esac
for image in "${@:-service}"; do
    case $image in
    service) file=docker/service.Dockerfile name=wan-service:$tag ;;
    cpu | cuda | npu) file=docker/worker.$image.Dockerfile name=wan-worker:$tag-$image ;;
    *)
        echo "error: there is no image $image: take service, cpu, cuda or npu" >&2
        exit 1
        ;;
    esac
    echo "$name"
    # shellcheck disable=SC2086  # build and OPTIONS are words
    $build ${OPTIONS:-} -f "$file" -t "$name" .
done
