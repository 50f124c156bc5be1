"""YOLO detectors of the Ultralytics and YOLOX families, with their decoding as far as it is in the export."""

from __future__ import annotations

from functools import partial

import numpy as np

from benchmarks.shapes.net import Net


def bottleneck(n: Net, x, out, k=(3, 3), e=1.0, shortcut=True, act="silu"):
    y = n.conv(n.conv(x, int(out * e), k[0], act=act), out, k[1], act=act)
    return n.add(x, y) if shortcut and x.shape[1] == out else y


def c3(n: Net, x, out, count=1, k=(1, 3), shortcut=True):
    half = out // 2
    y, z = n.conv(x, half, act="silu"), n.conv(x, half, act="silu")
    for _ in range(count):
        y = bottleneck(n, y, half, k, shortcut=shortcut)
    return n.conv(n.cat(y, z), out, act="silu")


def c2f(n: Net, x, out, count=1, shortcut=False, inner=None, e=0.5):
    """`inner(x, channels)` is the block repeated `count` times (C2f: bottleneck, C3k2: see c3k2)."""
    half = int(out * e)
    parts = list(n.halves(n.conv(x, 2 * half, act="silu")))
    for _ in range(count):
        last = parts[-1]
        parts.append(inner(last, half) if inner else bottleneck(n, last, half, shortcut=shortcut))
    return n.conv(n.cat(*parts), out, act="silu")


def sppf(n: Net, x, out, act="silu", shortcut=False):
    parts = [n.conv(x, x.shape[1] // 2, act=act)]
    for _ in range(3):
        parts.append(n.pool(parts[-1], 5, 1))
    y = n.conv(n.cat(*parts), out, act="silu")
    return n.add(y, x) if shortcut else y


def attention(n: Net, x):
    _, c, h, w = x.shape
    heads = max(c // 64, 1)
    key, dim, pixels = c // heads // 2, c // heads, h * w
    qkv = n.reshape(n.conv(x, c + 2 * key * heads, act=None), 1, heads, 2 * key + dim, pixels)
    q, k, v = (n.part(qkv, a, b, 2) for a, b in ((0, key), (key, 2 * key), (2 * key, 2 * key + dim)))
    weights = n.softmax(n.mul(n.matmul(n.transpose(q, 0, 1, 3, 2), k), n.zeros(1, 1, 1, 1)))
    y = n.reshape(n.matmul(v, n.transpose(weights, 0, 1, 3, 2)), 1, c, h, w)
    local = n.dw(n.reshape(v, 1, c, h, w), 3, 1, None)
    return n.conv(n.add(y, local), c, act=None)


def psa_block(n: Net, x):
    c = x.shape[1]
    x = n.add(x, attention(n, x))
    return n.add(x, n.conv(n.conv(x, 2 * c, act="silu"), c, act=None))


def c2psa(n: Net, x, count):
    a, b = n.halves(n.conv(x, x.shape[1], act="silu"))
    for _ in range(count):
        b = psa_block(n, b)
    return n.conv(n.cat(a, b), x.shape[1], act="silu")


def c3k2(n: Net, x, out, count, c3k, e=0.5, attn=False):
    def inner(y, half):
        if attn:
            return psa_block(n, bottleneck(n, y, half, e=0.5))
        if c3k:
            return c3(n, y, half, 2, (3, 3))
        return bottleneck(n, y, half, e=0.5)

    return c2f(n, x, out, count, inner=inner, e=e)


def head(n: Net, levels, light, bins=16, classes=80):
    """The decoupled head of YOLOv8 (`light`: of YOLO11 on), boxes per level and decoding."""
    first = levels[0].shape[1]
    c2, c3_ = max(16, first // 4, bins * 4), max(first, min(classes, 100))
    boxes, scores = [], []
    for x in levels:
        _, _, h, w = x.shape
        box = n.conv(n.conv(n.conv(x, c2, 3, act="silu"), c2, 3, act="silu"), 4 * bins, act=None)
        if light:
            y = n.conv(n.dw(x, 3, 1, "silu"), c3_, act="silu")
            y = n.conv(n.dw(y, 3, 1, "silu"), c3_, act="silu")
        else:
            y = n.conv(n.conv(x, c3_, 3, act="silu"), c3_, 3, act="silu")
        y = n.conv(y, classes, act=None)
        boxes.append(n.reshape(box, 1, 4 * bins, h * w))
        scores.append(n.reshape(y, 1, classes, h * w))
    box, score = n.cat(*boxes, axis=2), n.act(n.cat(*scores, axis=2), "sigmoid")
    if bins > 1:
        anchors = box.shape[2]
        y = n.softmax(n.transpose(n.reshape(box, 1, 4, bins, anchors), 0, 2, 1, 3), 1)
        box = n.reshape(n.conv(y, 1, act=None, bias=False), 1, 4, anchors)
    # corners to centre and size, times the stride
    near, far = n.part(box, 0, 2), n.part(box, 2, 4)
    grid = n.zeros(1, 2, box.shape[2])
    a, b = n.node("Sub", [grid, near], tuple(near.shape)), n.add(far, grid)
    middle = n.mul(n.add(a, b), n.zeros(1, 1, 1))
    sides = n.node("Sub", [b, a], tuple(near.shape))
    return n.cat(n.mul(n.cat(middle, sides), n.zeros(1, 1, box.shape[2])), score)


def v5(n: Net, depth, width):
    """YOLOv5 6.x with anchors."""

    def c(channels):
        return -int(-channels * width // 8) * 8

    def d(count):
        return max(round(count * depth), 1)

    x = n.conv(n.conv(n.input, c(64), 6, 2, act="silu", pad=2), c(128), 3, 2, act="silu")
    x = c3(n, x, c(128), d(3))
    p3 = c3(n, n.conv(x, c(256), 3, 2, act="silu"), c(256), d(6))
    p4 = c3(n, n.conv(p3, c(512), 3, 2, act="silu"), c(512), d(9))
    p5 = sppf(n, c3(n, n.conv(p4, c(1024), 3, 2, act="silu"), c(1024), d(3)), c(1024))
    a = n.conv(p5, c(512), act="silu")
    b = n.conv(c3(n, n.cat(n.up(a), p4), c(512), d(3), shortcut=False), c(256), act="silu")
    f3 = c3(n, n.cat(n.up(b), p3), c(256), d(3), shortcut=False)
    f4 = c3(n, n.cat(n.conv(f3, c(256), 3, 2, act="silu"), b), c(512), d(3), shortcut=False)
    f5 = c3(n, n.cat(n.conv(f4, c(512), 3, 2, act="silu"), a), c(1024), d(3), shortcut=False)
    return anchors_head(n, (f3, f4, f5))


def anchors_head(n: Net, levels, classes=80):
    rows = []
    for x in levels:
        _, _, h, w = x.shape
        y = n.conv(x, 3 * (classes + 5), act=None)
        y = n.transpose(n.reshape(y, 1, 3, classes + 5, h, w), 0, 1, 3, 4, 2)
        y = n.act(y, "sigmoid")
        xy, wh, rest = (n.part(y, a, b, 4) for a, b in ((0, 2), (2, 4), (4, classes + 5)))
        xy, wh = (
            n.mul(n.add(xy, n.zeros(1, 1, 1, 1, 1)), n.zeros(1, 1, 1, 1, 1)),
            n.mul(wh, n.zeros(1, 1, 1, 1, 1)),
        )
        rows.append(n.reshape(n.cat(xy, wh, rest, axis=4), 1, 3 * h * w, classes + 5))
    return n.cat(*rows, axis=1)


def v8(n: Net, depth, width, most):
    def c(channels):
        return -int(-min(channels, most) * width // 8) * 8

    def d(count):
        return max(round(count * depth), 1)

    x = n.conv(n.conv(n.input, c(64), 3, 2, act="silu"), c(128), 3, 2, act="silu")
    x = c2f(n, x, c(128), d(3), True)
    p3 = c2f(n, n.conv(x, c(256), 3, 2, act="silu"), c(256), d(6), True)
    p4 = c2f(n, n.conv(p3, c(512), 3, 2, act="silu"), c(512), d(6), True)
    p5 = sppf(n, c2f(n, n.conv(p4, c(1024), 3, 2, act="silu"), c(1024), d(3), True), c(1024))
    a = c2f(n, n.cat(n.up(p5), p4), c(512), d(3))
    f3 = c2f(n, n.cat(n.up(a), p3), c(256), d(3))
    f4 = c2f(n, n.cat(n.conv(f3, c(256), 3, 2, act="silu"), a), c(512), d(3))
    f5 = c2f(n, n.cat(n.conv(f4, c(512), 3, 2, act="silu"), p5), c(1024), d(3))
    return head(n, (f3, f4, f5), light=False)


def v11(n: Net, depth, width, most, big, v26=False):
    """YOLO11; `v26`: YOLO26 (no distribution over bins, more C3k, attention in the last block)."""

    def c(channels):
        return -int(-min(channels, most) * width // 8) * 8

    def block(x, channels, c3k, e=0.5, attn=False):
        count = max(round((1 if attn else 2) * depth), 1)
        return c3k2(n, x, c(channels), count, c3k or big, e, attn)

    x = n.conv(n.conv(n.input, c(64), 3, 2, act="silu"), c(128), 3, 2, act="silu")
    x = block(x, 256, False, 0.25)
    p3 = block(n.conv(x, c(256), 3, 2, act="silu"), 512, False, 0.25)
    p4 = block(n.conv(p3, c(512), 3, 2, act="silu"), 512, True)
    p5 = block(n.conv(p4, c(1024), 3, 2, act="silu"), 1024, True)
    p5 = sppf(n, p5, c(1024), act=None if v26 else "silu", shortcut=v26)
    p5 = c2psa(n, p5, max(round(2 * depth), 1))
    a = block(n.cat(n.up(p5), p4), 512, v26)
    f3 = block(n.cat(n.up(a), p3), 256, v26)
    f4 = block(n.cat(n.conv(f3, c(256), 3, 2, act="silu"), a), 512, v26)
    f5 = block(n.cat(n.conv(f4, c(512), 3, 2, act="silu"), p5), 1024, True, attn=v26)
    found = head(n, (f3, f4, f5), light=True, bins=1 if v26 else 16)
    return top(n, found) if v26 else found


def top(n: Net, found, keep=300):
    """The end-to-end selection: the best score of every box, then the best boxes."""
    rows = n.transpose(found, 0, 2, 1)
    anchors, classes = rows.shape[1], rows.shape[2] - 4
    box, score = n.part(rows, 0, 4, 2), n.part(rows, 4, 4 + classes, 2)
    best = n.node("ReduceMax", [score, n.constant(np.array([2], np.int64))], (1, anchors), keepdims=0)
    _, first = n.topk(best, keep)
    scores, second = n.topk(n.reshape(n.gather(score, first, classes), 1, keep * classes), keep)
    boxes = n.gather(box, second, 4)
    return n.cat(boxes, n.reshape(scores, 1, keep, 1), axis=2)


def yolox(n: Net, depth, width, nano=False):
    """Ge et al. 2021, the raw head (decoding outside the network)."""

    def c(channels):
        return int(channels * width)

    def d(count):
        return max(round(count * depth), 1)

    def conv(x, out, k=1, s=1):
        if nano and k == 3:
            x = n.dw(x, 3, s, "silu")
            return n.conv(x, out, act="silu")
        return n.conv(x, out, k, s, act="silu")

    def csp(x, out, count, shortcut=True):
        half = out // 2
        y, z = conv(x, half), conv(x, half)
        for _ in range(count):
            w = conv(conv(y, half), half, 3)
            y = n.add(y, w) if shortcut else w
        return conv(n.cat(y, z), out)

    focus = n.conv(n.input, c(64), 6, 2, act="silu", pad=2)  # the Focus slices, folded into the convolution
    x = csp(conv(focus, c(128), 3, 2), c(128), d(3))
    p3 = csp(conv(x, c(256), 3, 2), c(256), d(9))
    p4 = csp(conv(p3, c(512), 3, 2), c(512), d(9))
    x = conv(p4, c(1024), 3, 2)
    y = conv(x, c(512))
    p5 = csp(conv(n.cat(y, *(n.pool(y, k, 1) for k in (5, 9, 13))), c(1024)), c(1024), d(3), False)
    a = conv(p5, c(512))
    b = conv(csp(n.cat(n.up(a), p4), c(512), d(3), False), c(256))
    f3 = csp(n.cat(n.up(b), p3), c(256), d(3), False)
    f4 = csp(n.cat(conv(f3, c(256), 3, 2), b), c(512), d(3), False)
    f5 = csp(n.cat(conv(f4, c(512), 3, 2), a), c(1024), d(3), False)
    rows = []
    for x in (f3, f4, f5):
        stem = n.conv(x, c(256), act="silu")
        kind, box = conv(conv(stem, c(256), 3), c(256), 3), conv(conv(stem, c(256), 3), c(256), 3)
        kind = n.conv(kind, 80, act="sigmoid")
        y = n.cat(n.conv(box, 4, act=None), n.conv(box, 1, act="sigmoid"), kind)
        rows.append(n.reshape(y, 1, 85, y.shape[2] * y.shape[3]))
    return n.transpose(n.cat(*rows, axis=2), 0, 2, 1)


SCALES8 = {
    "n": (0.33, 0.25, 1024),
    "s": (0.33, 0.5, 1024),
    "m": (0.67, 0.75, 768),
    "l": (1, 1, 512),
    "x": (1, 1.25, 512),
}
SCALES11 = {
    "n": (0.5, 0.25, 1024, False), "s": (0.5, 0.5, 1024, False), "m": (0.5, 1, 512, True), "l": (1, 1, 512, True),
    "x": (1, 1.5, 512, True),
}  # fmt: skip
SCALES5 = {"n": (0.33, 0.25), "s": (0.33, 0.5), "m": (0.67, 0.75), "l": (1, 1), "x": (1.33, 1.25)}
SCALESX = {"tiny": (0.33, 0.375), "s": (0.33, 0.5), "m": (0.67, 0.75), "l": (1, 1), "x": (1.33, 1.25)}

NETWORKS = {
    **{f"yolov5{k}": partial(v5, depth=d, width=w) for k, (d, w) in SCALES5.items()},
    **{f"yolov8{k}": partial(v8, depth=d, width=w, most=m) for k, (d, w, m) in SCALES8.items()},
    **{f"yolo11{k}": partial(v11, depth=d, width=w, most=m, big=b) for k, (d, w, m, b) in SCALES11.items()},
    **{
        f"yolo26{k}": partial(v11, depth=d, width=w, most=m, big=b, v26=True)
        for k, (d, w, m, b) in SCALES11.items()
    },
    "yolox_nano": partial(yolox, depth=0.33, width=0.25, nano=True),
    **{f"yolox_{k}": partial(yolox, depth=d, width=w) for k, (d, w) in SCALESX.items()},
}
