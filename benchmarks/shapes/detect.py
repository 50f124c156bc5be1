"""Detectors and segmenters of other families."""

from __future__ import annotations

from functools import partial

from benchmarks.shapes.classify import mobilenet_v1_body, resnet_body, resnet_stem
from benchmarks.shapes.net import Net


def ssd_mobilenet_v1(n: Net, classes=21):
    """Liu et al. 2016 on MobileNetV1, the heads of chuanqi305's Caffe network (1x1 kernels)."""
    blocks = list(mobilenet_v1_body(n, act="relu"))
    levels = [blocks[10], blocks[12]]
    x = blocks[12]
    for squeeze, out in ((256, 512), (128, 256), (128, 256), (64, 128)):
        x = n.conv(n.conv(x, squeeze), out, 3, 2)
        levels.append(x)
    rows = []
    for i, x in enumerate(levels):
        for per in (4, classes):
            y = n.conv(x, (3 if i == 0 else 6) * per, act=None)
            y = n.transpose(y, 0, 2, 3, 1)
            rows.append((per, n.reshape(y, 1, y.shape[1] * y.shape[2] * y.shape[3])))
    boxes = n.cat(*(y for per, y in rows if per == 4))
    scores = n.cat(*(y for per, y in rows if per == classes))
    return [boxes, n.softmax(n.reshape(scores, 1, scores.shape[1] // classes, classes))]


def fcn_resnet18(n: Net, classes=21):
    """dusty-nv's FCN-ResNet18: the backbone and a 1x1 classifier at stride 32."""
    *_, x = resnet_body(n, resnet_stem(n), (2, 2, 2, 2), False)
    return n.conv(x, classes, act=None)


def v3_tiny(n: Net):
    x = n.input
    for out in (16, 32, 64, 128):
        x = n.pool(n.conv(x, out, 3, act="leaky"), 2, 2, 0)
    p4 = n.conv(x, 256, 3, act="leaky")
    x = n.conv(n.pool(p4, 2, 2, 0), 512, 3, act="leaky")
    x = n.conv(n.conv(x, 1024, 3, act="leaky"), 256, act="leaky")
    big = n.conv(n.conv(x, 512, 3, act="leaky"), 255, act=None)
    y = n.cat(n.up(n.conv(x, 128, act="leaky")), p4)
    return [big, n.conv(n.conv(y, 256, 3, act="leaky"), 255, act=None)]


def v3(n: Net):
    """Redmon and Farhadi 2018."""

    def stage(x, out, count):
        x = n.conv(x, out, 3, 2, act="leaky")
        for _ in range(count):
            x = n.add(x, n.conv(n.conv(x, out // 2, act="leaky"), out, 3, act="leaky"))
        return x

    def five(x, c):
        for _ in range(2):
            x = n.conv(n.conv(x, c, act="leaky"), 2 * c, 3, act="leaky")
        return n.conv(x, c, act="leaky")

    def out(x):
        return n.conv(n.conv(x, 2 * x.shape[1], 3, act="leaky"), 255, act=None)

    x = stage(stage(n.conv(n.input, 32, 3, act="leaky"), 64, 1), 128, 2)
    p3 = stage(x, 256, 8)
    p4 = stage(p3, 512, 8)
    a = five(stage(p4, 1024, 4), 512)
    b = five(n.cat(n.up(n.conv(a, 256, act="leaky")), p4), 256)
    c = five(n.cat(n.up(n.conv(b, 128, act="leaky")), p3), 128)
    return [out(a), out(b), out(c)]


def v4_tiny(n: Net):
    """Bochkovskiy et al. 2020, tiny."""
    x = n.conv(n.conv(n.input, 32, 3, 2, act="leaky"), 64, 3, 2, act="leaky")
    for out in (64, 128, 256):
        x = n.conv(x, out, 3, act="leaky")
        a = n.conv(n.part(x, out // 2, out), out // 2, 3, act="leaky")
        b = n.conv(a, out // 2, 3, act="leaky")
        side = n.conv(n.cat(b, a), out, act="leaky")
        x = n.pool(n.cat(x, side), 2, 2, 0)
    x = n.conv(n.conv(x, 512, 3, act="leaky"), 256, act="leaky")
    big = n.conv(n.conv(x, 512, 3, act="leaky"), 255, act=None)
    y = n.cat(n.up(n.conv(x, 128, act="leaky")), side)
    return [big, n.conv(n.conv(y, 256, 3, act="leaky"), 255, act=None)]


def v7_tiny(n: Net):
    """Wang et al. 2022, tiny."""

    def conv(x, out, k=1, s=1):
        return n.conv(x, out, k, s, act="leaky")

    def elan(x, c, out):
        a, b = conv(x, c), conv(x, c)
        d = conv(b, c, 3)
        return conv(n.cat(conv(d, c, 3), d, b, a), out)

    x = elan(conv(conv(n.input, 32, 3, 2), 64, 3, 2), 32, 64)
    p3 = elan(n.pool(x, 2, 2, 0), 64, 128)
    p4 = elan(n.pool(p3, 2, 2, 0), 128, 256)
    p5 = elan(n.pool(p4, 2, 2, 0), 256, 512)
    a, b = conv(p5, 256), conv(p5, 256)
    b = conv(n.cat(*(n.pool(b, k, 1) for k in (13, 9, 5)), b), 256)
    p5 = conv(n.cat(b, a), 256)
    a = elan(n.cat(conv(p4, 128), n.up(conv(p5, 128))), 64, 128)
    f3 = elan(n.cat(conv(p3, 64), n.up(conv(a, 64))), 32, 64)
    f4 = elan(n.cat(conv(f3, 128, 3, 2), a), 64, 128)
    f5 = elan(n.cat(conv(f4, 256, 3, 2), p5), 128, 256)
    return [n.conv(conv(x, out, 3), 255, act=None) for x, out in ((f3, 128), (f4, 256), (f5, 512))]


NETWORKS = {
    "mobilenet_v1_ssd": ssd_mobilenet_v1,
    "ssd_mobilenet_v1_coco": partial(ssd_mobilenet_v1, classes=91),
    "fcn-resnet18": fcn_resnet18,
    "yolov3": v3,
    "yolov3-tiny": v3_tiny,
    "yolov4-tiny": v4_tiny,
    "yolov7-tiny": v7_tiny,
}
