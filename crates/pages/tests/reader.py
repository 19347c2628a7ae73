#!/usr/bin/env python3
"""A second reader of page stores, written from docs/formats/pages.md alone.

    reader.py STORE [NODE:PAGES ...]

Checks every byte of every pack in STORE that the format says something about, then reads the maps with the given
roots and writes their images to standard output, one behind the other. Whatever is wrong goes to standard error, and
the exit status is then 1; what can be read all the same is read. The index is ignored.

It shares nothing with the library, not even BLAKE3, so that an error there cannot hide here: keep it so.
"""

import os
import struct
import subprocess
import sys
from array import array

PAGE = 4096
ZERO = bytes(32)
NEWEST = 2


class Damage(Exception):
    """Something is not as the format says."""


def require(condition, what):
    if not condition:
        raise Damage(what)


# BLAKE3. Several inputs of one length are hashed side by side: a "word" is a Python integer with a lane of 64 bits
# for each input, of which the lower 32 are used. So a page costs about a tenth of what it would cost alone.

IV = [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19]
PERMUTATION = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
CHUNK_START, CHUNK_END, PARENT, ROOT, KEYED, DERIVE_CONTEXT, DERIVE_MATERIAL = 1, 2, 4, 8, 16, 32, 64
COLUMNS_AND_DIAGONALS = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
                         (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]


def compress(chaining, message, counter, length, flags, ones):
    """The first half of the output: all that 32 bytes of hash and chaining values need."""
    mask = ones * 0xFFFFFFFF
    rest = [word * ones for word in IV[:4] + [counter & 0xFFFFFFFF, counter >> 32, length, flags]]
    state, m = chaining + rest, message
    for _ in range(7):
        for i, (a, b, c, d) in enumerate(COLUMNS_AND_DIAGONALS):
            va, vb, vc, vd = state[a], state[b], state[c], state[d]
            va = va + vb + m[2 * i] & mask
            vd ^= va
            vd = (vd >> 16 | vd << 16) & mask
            vc = vc + vd & mask
            vb ^= vc
            vb = (vb >> 12 | vb << 20) & mask
            va = va + vb + m[2 * i + 1] & mask
            vd ^= va
            vd = (vd >> 8 | vd << 24) & mask
            vc = vc + vd & mask
            vb ^= vc
            vb = (vb >> 7 | vb << 25) & mask
            state[a], state[b], state[c], state[d] = va, vb, vc, vd
        m = [m[i] for i in PERMUTATION]
    return [state[i] ^ state[i + 8] for i in range(8)]


def lanes(blocks):
    """The 16 words of blocks of 64 bytes that lie side by side."""
    words = array("I", b"".join(blocks))
    if sys.byteorder != "little":
        words.byteswap()
    return [int.from_bytes(struct.pack(f"<{len(blocks)}Q", *words[i::16]), "little") for i in range(16)]


def blake3_many(inputs, key_words, mode):
    """The hashes of inputs that all have the same length."""
    count, length = len(inputs), len(inputs[0])
    ones = sum(1 << 64 * i for i in range(count))
    key = [word * ones for word in key_words]
    chunks = max(1, -(-length // 1024))
    nodes = []
    for chunk in range(chunks):
        chaining, start = key, 1024 * chunk
        end = min(length, start + 1024)
        blocks = max(1, -(-(end - start) // 64))
        for block in range(blocks):
            low = start + 64 * block
            high = min(end, low + 64)
            flags = mode | (CHUNK_START if block == 0 else 0)
            if block == blocks - 1:
                flags |= CHUNK_END | (ROOT if chunks == 1 else 0)
            message = lanes([data[low:high].ljust(64, b"\0") for data in inputs])
            chaining = compress(chaining, message, chunk, high - low, flags, ones)
        nodes.append(chaining)
    while len(nodes) > 1:  # pairs, and the odd one goes up: the left side is always the largest power of two
        root = ROOT if len(nodes) == 2 else 0
        pairs = [compress(key, nodes[i] + nodes[i + 1], 0, 64, mode | PARENT | root, ones)
                 for i in range(0, len(nodes) - 1, 2)]
        nodes = pairs + nodes[len(nodes) & ~1:]
    columns = [word.to_bytes(8 * count, "little") for word in nodes[0]]
    return [b"".join(column[8 * i:8 * i + 4] for column in columns) for i in range(count)]


def words(key):
    return list(struct.unpack("<8I", key))


def plain(data):
    """`H(data)`"""
    return blake3_many([data], IV, 0)[0]


def keyed_many(key, inputs):
    """`H(key, input)` of each input."""
    return blake3_many(inputs, words(key), KEYED) if inputs else []


def derive(context, material):
    """`D(context, material)`"""
    context_key = blake3_many([context.encode()], IV, DERIVE_CONTEXT)[0]
    return blake3_many([material], words(context_key), DERIVE_MATERIAL)[0]


# Keys

class Group:
    """The group key and what follows from it."""

    def __init__(self, store):
        with open(os.path.join(store, "key"), "rb") as file:
            text = file.read()
        require(len(text) == 65 and text.endswith(b"\n") and text == text.lower(), "the key file is not a key")
        key = bytes.fromhex(text.decode())
        self.pages = derive("Spinney page store v1, names of pages", key)
        self.nodes = derive("Spinney page store v1, names of map nodes", key)
        self.fingerprint = derive("Spinney page store v1, group fingerprint", key)[:16]


# Packs

def unzstd(data):
    try:
        from compression import zstd  # Python 3.14
        return zstd.decompress(data)
    except ImportError:
        pass
    done = subprocess.run(["zstd", "-d", "-c", "-q"], input=data, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    require(done.returncode == 0, "zstd: " + done.stderr.decode(errors="replace").strip())
    return done.stdout


class Pack:
    """A pack whose header, table, footer and trailer are as they should be."""

    RAW, FRAMES, IMAGE = 0, 1, 2

    def __init__(self, store, file_name, group):
        self.group, self.store = group, store
        with open(os.path.join(store, "packs", file_name), "rb") as file:
            self.data = data = file.read()
        self.header(file_name)
        self.frames = {}
        if self.version == 1:
            table, footer = self.trailer_1()
        else:
            table, footer = self.trailer_2()
        self.read_table(table)
        self.read_footer(footer)

    def header(self, file_name):
        data = self.data
        require(len(data) >= PAGE and data[:8] == b"SPINPACK", "no header of a pack")
        require(plain(data[:4064]) == data[4064:4096], "checksum of the header")
        self.version, page = struct.unpack_from("<II", data, 8)
        if self.version > NEWEST:
            sys.exit(f"{file_name}: version {self.version} is newer than this program")
        require(self.version >= 1 and page == PAGE, "version or page size")
        self.id, fingerprint = struct.unpack_from("<Q16s", data, 16)
        require(file_name == f"{self.id:016x}.pack", "the file has another pack's name")
        require(fingerprint == self.group.fingerprint, "a pack of another group")
        self.body, self.per_frame, used = self.RAW, 0, 40
        if self.version == 2:
            self.body, self.per_frame = struct.unpack_from("<II", data, 56)
            used = 64
            require(self.body <= 2, "kind of body")
            require(1 <= self.per_frame <= 256 if self.body == self.FRAMES else self.per_frame == 0, "pages in a frame")
        require(not any(data[used:4064]), "the rest of the header is not zero")

    def trailer_1(self):
        data, end = self.data, len(self.data) - 128
        require(end >= PAGE and data[end:end + 8] == b"SPINTAIL", "no trailer")
        require(plain(data[end:end + 96]) == data[end + 96:], "checksum of the trailer")
        pack, self.page_count, self.node_count, self.nodes_at, self.node_bytes, footer_at, footer_bytes = \
            struct.unpack_from("<7Q", data, end + 8)
        require(pack == self.id, "the trailer has another id")
        self.body_bytes = PAGE * self.page_count
        require(self.nodes_at == PAGE + self.body_bytes, "offset of the nodes")
        require(footer_at == self.nodes_at + self.node_bytes, "offset of the footer")
        require(footer_bytes == 40 * (self.page_count + self.node_count), "bytes of the footer")
        require(footer_at + footer_bytes == end, "length of the file")
        require(plain(data[footer_at:end]) == data[end + 64:end + 96], "checksum of the footer")
        return b"", data[footer_at:end]

    def trailer_2(self):
        data, end = self.data, len(self.data) - 160
        require(end >= PAGE and data[end:end + 8] == b"SPINTAIL", "no trailer")
        require(plain(data[end:end + 128]) == data[end + 128:], "checksum of the trailer")
        pack, self.page_count, self.node_count, self.body_bytes, self.node_bytes, table_bytes, footer_bytes = \
            struct.unpack_from("<7Q", data, end + 8)
        require(pack == self.id, "the trailer has another id")
        if self.body == self.RAW:
            require(self.body_bytes == PAGE * self.page_count, "bytes of the body")
        elif self.body == self.IMAGE:
            require(self.body_bytes == 0, "bytes of the body")
        require(self.body_bytes % 8 == 0 and self.node_bytes % 8 == 0, "lengths are multiples of 8")
        require(footer_bytes == 24 * (self.page_count + self.node_count), "bytes of the footer")
        self.nodes_at = PAGE + self.body_bytes
        table_at = self.nodes_at + self.node_bytes
        footer_at = table_at + table_bytes
        require(footer_at + footer_bytes == end, "length of the file")
        table, footer = data[table_at:footer_at], data[footer_at:end]
        require(plain(table) == data[end + 64:end + 96], "checksum of the table")
        require(plain(footer) == data[end + 96:end + 128], "checksum of the footer")
        return table, footer

    def read_table(self, table):
        if self.body == self.RAW:
            require(not table, "a table that should be empty")
        elif self.body == self.FRAMES:
            count = -(-self.page_count // self.per_frame)
            require(len(table) == 4 * count, "length of the table")
            self.frame_at = [PAGE + 8 * place for place in struct.unpack(f"<{count}I", table)]
            ends = self.frame_at[1:] + [self.nodes_at]
            require(self.frame_at[:1] in ([PAGE], []) and all(a < b for a, b in zip(self.frame_at, ends)),
                    "the frames do not follow each other")
            require(self.frame_at or self.body_bytes == 0, "a body without frames")
        else:
            self.image_bytes, self.image_time, private, label, path, part, parts = struct.unpack_from("<QqIHHII", table)
            require(private <= 1 and part < parts, "table of an image")
            self.private = private == 1
            require(len(table) == 32 + label + path, "length of the table")
            table[32:32 + label].decode()
            path = table[32 + label:]
            require(path and b"\0" not in path, "path of the image")
            self.image_path = os.path.join(os.fsencode(self.store), path)

    def read_footer(self, footer):
        """`self.entries`: name or fingerprint, whether it is a node, slot or offset in the file, length"""
        self.entries = []
        if self.version == 1:
            for name, place, length, kind, zero in struct.iter_unpack("<32sIHBB", footer):
                require(kind <= 1 and zero == 0, "kind of an entry")
                offset = 8 * place
                if kind == 0:
                    require(offset % PAGE == 0 and offset >= PAGE, "a page that is not aligned")
                    offset = offset // PAGE - 1
                self.entries.append((name, kind == 1, offset, length))
        else:
            for name, place, length, zero in struct.iter_unpack("<16sIHH", footer):
                require(zero == 0, "the end of an entry is not zero")
                node = place >> 31 == 1
                self.entries.append((name, node, self.nodes_at + 8 * (place - 2**31) if node else place, length))
        names = [name[:16] for name, *_ in self.entries]
        require(all(a < b for a, b in zip([ZERO[:16]] + names, names)), "the footer is not sorted, or names the zero page")
        pages = sorted(place for _, node, place, _ in self.entries if not node)
        nodes = sorted((place, length) for _, node, place, length in self.entries if node)
        require(len(pages) == self.page_count and len(nodes) == self.node_count, "numbers of pages and nodes")
        require(all(length == PAGE for _, node, _, length in self.entries if not node), "length of a page")
        if self.body == self.IMAGE:
            require(len(set(pages)) == len(pages), "a slot with two entries")
            require(all(PAGE * (slot + 1) <= self.image_bytes for slot in pages), "a slot past the end of the image")
        else:
            require(pages == list(range(self.page_count)), "slots without an entry, or with two")
        at = self.nodes_at
        for place, length in nodes:
            require(place == at, "nodes that do not follow each other")
            at += length
        require(at == self.nodes_at + self.node_bytes, "bytes of nodes")

    def frame(self, number):
        """The pages of a frame, as one string."""
        if number not in self.frames:
            at = self.frame_at[number]
            end = (self.frame_at + [self.nodes_at])[number + 1]
            require(end - at >= 16, "a frame without room for its header")
            magic, size, pages, kind, zero = struct.unpack_from("<4sIHHI", self.data, at)
            require(magic == b"SPFR" and zero == 0, "no frame")
            require(pages == min(self.per_frame, self.page_count - number * self.per_frame), "pages of a frame")
            require(end == at + (16 + size + 7) // 8 * 8, "length of a frame")
            require(not any(self.data[at + 16 + size:end]), "a frame is padded with something else than zeros")
            content = self.data[at + 16:at + 16 + size]
            require(kind <= 1, "content of a frame")
            if kind == 1:
                content = unzstd(content)
            require(len(content) == PAGE * pages, "bytes of a frame")
            self.frames = {number: content}  # the last one only
        return self.frames[number]

    def read(self, node, place, length):
        if node:
            return self.data[place:place + length]
        if self.body == self.RAW:
            return self.data[PAGE + PAGE * place:PAGE + PAGE * place + PAGE]
        if self.body == self.FRAMES:
            start = PAGE * (place % self.per_frame)
            return self.frame(place // self.per_frame)[start:start + PAGE]
        try:
            with open(self.image_path, "rb") as file:
                file.seek(PAGE * place)
                return file.read(PAGE)
        except OSError as error:
            raise Damage(f"image: {error}") from None

    def check_contents(self):
        """Every page and node has its name."""
        pages = sorted((place, name) for name, node, place, _ in self.entries if not node)
        for start in range(0, len(pages), 64):
            part = pages[start:start + 64]
            contents = [self.read(False, place, PAGE) for place, _ in part]
            require(all(len(content) == PAGE for content in contents), "a page that is cut off")
            require(not any(content == bytes(PAGE) for content in contents), "a page of zeros is stored")
            for (place, name), real in zip(part, keyed_many(self.group.pages, contents)):
                require(real.startswith(name), f"page {place} is not what its name says")
        for name, node, place, length in self.entries:
            if node:
                content = self.read(True, place, length)
                require(keyed_many(self.group.nodes, [content])[0].startswith(name), f"the node at {place} is not what its name says")
                children(content)


# Maps

def children(node):
    """The level of an encoded node, and the names of its 64 children."""
    require(len(node) >= 16, "a node that is too short")
    kind, level, count, zero, bitmap = struct.unpack_from("<BBHIQ", node)
    require(kind == 1 and zero == 0 and level <= 10, "head of a node")
    require(count == bin(bitmap).count("1") and count > 0 and len(node) == 16 + 32 * count, "children of a node")
    names = iter([node[at:at + 32] for at in range(16, len(node), 32)])
    found = [next(names) if bitmap >> i & 1 else ZERO for i in range(64)]
    require(found.count(ZERO) == 64 - count, "a zero child that is written down")
    return level, found


class Store:
    def __init__(self, store):
        self.wrong = False
        self.group = Group(store)
        self.packs, self.places = [], {}
        for name in sorted(os.listdir(os.path.join(store, "packs"))):
            if name.endswith(".pack"):
                try:
                    self.packs.append(Pack(store, name, self.group))
                    self.packs[-1].check_contents()
                except (Damage, struct.error, UnicodeDecodeError) as damage:
                    self.complain(f"{name}: {damage}")
        # What is in a pack of our own is not looked for in an image.
        for pack in sorted(self.packs, key=lambda pack: pack.body == Pack.IMAGE):
            for name, node, place, length in pack.entries:
                self.places.setdefault((name[:16], node), []).append((pack, place, length))

    def complain(self, text):
        print(text, file=sys.stderr)
        self.wrong = True

    def get(self, names, node):
        """What the names name; each copy is as good as the others, and what is damaged is passed over."""
        found, most = {}, max([len(self.places.get((name[:16], node), ())) for name in names], default=0)
        key = self.group.nodes if node else self.group.pages
        for attempt in range(most):
            contents = []
            for name in names:
                copies = self.places.get((name[:16], node), ())
                if name not in found and attempt < len(copies):
                    pack, place, length = copies[attempt]
                    try:
                        contents.append(pack.read(node, place, length))
                    except Damage as damage:
                        self.complain(str(damage))
            by_length = {}
            for content in contents:
                by_length.setdefault(len(content), []).append(content)
            for same in by_length.values():
                found.update(zip(keyed_many(key, same), same))
        for name in names:
            require(name in found, f"{'node' if node else 'page'} {name.hex()} is missing")
        return [found[name] for name in names]

    def image(self, name, pages, out):
        """Writes the image whose map has this root to `out`."""
        level = 0
        while 64 ** (level + 1) < pages:
            level += 1
        self.subtree(name, level, 0, pages, out)

    def subtree(self, name, level, first, end, out):
        covered = min(64 ** (level + 1), end - first)
        if name == ZERO:
            for at in range(0, covered, 256):
                out.write(bytes(PAGE * min(256, covered - at)))
            return
        real_level, names = children(self.get([name], True)[0])
        require(real_level == level, "a node of another level")
        inside = -(-covered // 64 ** level)
        require(all(child == ZERO for child in names[inside:]), "a child past the end of the map")
        if level > 0:
            for i, child in enumerate(names[:inside]):
                self.subtree(child, level - 1, first + i * 64 ** level, end, out)
            return
        there = list({child: None for child in names if child != ZERO})
        pages = dict(zip(there, self.get(there, False)))
        pages[ZERO] = bytes(PAGE)
        for child in names[:inside]:
            out.write(pages[child])


def main(store, *roots):
    store = Store(store)
    for root in roots:
        name, pages = root.split(":")
        store.image(bytes.fromhex(name), int(pages), sys.stdout.buffer)
    sys.stdout.buffer.flush()
    sys.exit(1 if store.wrong else 0)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except Damage as damage:
        sys.exit(str(damage))
