# Sourced by deploy/node/build and deploy/guest/build: how an initramfs is put together, and how a
# kernel is unpacked.
PATH=$PATH:/usr/sbin:/sbin

# The kernel's version, from its unpacked folder.
kernel_version() { basename "$1"/lib/modules/*; }

# unpack_kernel BZIMAGE FILE: the ELF image that is packed in a bzImage (Documentation/arch/x86/boot.rst:
# setup_sects, payload_offset, payload_length). Fails where there is none, or none with a PVH entry point.
unpack_kernel() {
    local image=$1 file=$2 offset length
    number() { od -A n -t "u$2" -j "$1" -N "$2" "$image" | tr -d ' '; }
    offset=$((($(number 497 1) + 1) * 512 + $(number 584 4)))
    length=$(number 588 4)
    payload() { head -c "$((offset + length - ${1:-0}))" "$image" | tail -c "+$((offset + 1))"; }
    # Behind each is its length unpacked, 4 bytes, which gzip has as its own.
    case $(payload | head -c 4 | od -A n -t x1 | tr -d ' ') in
    fd377a58) payload 4 | xz -dc ;;
    28b52ffd) payload 4 | zstd -dc ;;
    02214c18) payload 4 | lz4 -dc ;;
    1f8b*) payload | gzip -dc ;;
    *) return 1 ;;
    esac >"$file" || return 1
    readelf -n "$file" 2>/dev/null | grep 'Xen .*0x00000012' >/dev/null # -q would break the pipe
}

# add_modules KERNEL ROOT NAME...: copies modules with all they need into ROOT/modules and appends
# them, in loading order, to ROOT/modules/order.
add_modules() {
    local kernel=$1 root=$2 version name line file
    shift 2
    version=$(kernel_version "$kernel")
    mkdir -p "$root/modules"
    touch "$root/modules/order"
    for name in "$@"; do
        modprobe -d "$kernel" -S "$version" --show-depends "$name" 2>/dev/null || {
            echo "initramfs: $kernel has no module $name" >&2
            return 1
        }
    done | while read -r kind file line; do
        [ "$kind" = insmod ] || continue # the rest is built in
        name=$(basename "$file")
        name=${name%.xz}
        name=${name%.zst}
        grep -qx "$name" "$root/modules/order" && continue
        case $file in
        *.xz) xz -dc "$file" >"$root/modules/$name" ;;
        *.zst) zstd -qdc "$file" >"$root/modules/$name" ;;
        *) cp "$file" "$root/modules/$name" ;;
        esac
        echo "$name" >>"$root/modules/order"
    done
}

# add_binary ROOT FILE: copies a program, stripped, into ROOT/bin and its shared libraries to where
# the loader looks for them.
add_binary() {
    local root=$1 file=$2
    mkdir -p "$root/bin"
    strip -o "$root/bin/$(basename "$file")" "$file"
    add_libraries "$root" "$file"
}

# add_libraries ROOT FILE: the shared libraries of a program, and the loader.
add_libraries() {
    local root=$1 file=$2 library
    ldd "$file" | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        [ -e "$root$library" ] || cp -L "$library" "$root$library"
    done
}

# pack ROOT FILE: the archive, uncompressed: unpacking costs more than reading where the CPU is emulated.
pack() {
    (cd "$1" && find . -print0 | LC_ALL=C sort -z | cpio --quiet -0 -o -H newc -R 0:0) >"$2.tmp"
    mv "$2.tmp" "$2"
}
