"""Classifiers."""

from __future__ import annotations

from functools import partial

from benchmarks.shapes.net import Net, rounded


def resnet_stem(n: Net):
    return n.pool(n.conv(n.input, 64, 7, 2), 3, 2)


def resnet_body(n: Net, x, blocks, bottleneck, width=64, groups=1, se=False):
    """He et al. 2016; groups and width as ResNeXt and Wide ResNet. Yields the output of every stage."""
    for stage, count in enumerate(blocks):
        out = 64 * 2**stage * (4 if bottleneck else 1)
        inner = width * 2**stage if bottleneck else 64 * 2**stage
        for i in range(count):
            s = 2 if stage and not i else 1
            if bottleneck:
                y = n.conv(n.conv(x, inner, 1), inner, 3, s, groups)
                y = n.conv(y, out, 1, act=None)
            else:
                y = n.conv(n.conv(x, out, 3, s), out, 3, act=None)
            if se:
                y = n.se(y, out // 16, gate="sigmoid")
            short = x if x.shape[1] == out and s == 1 else n.conv(x, out, 1, s, act=None)
            x = n.add(y, short, "relu")
        yield x


def resnet(n: Net, blocks, bottleneck, width=64, groups=1, se=False):
    *_, x = resnet_body(n, resnet_stem(n), blocks, bottleneck, width, groups, se)
    return n.fc(n.mean(x), 1000)


def vgg(n: Net, counts):
    x = n.input
    for count, out in zip(counts, (64, 128, 256, 512, 512), strict=True):
        for _ in range(count):
            x = n.conv(x, out, 3)
        x = n.pool(x, 2, 2, 0)
    return n.fc(n.fc(n.fc(x, 4096, "relu"), 4096, "relu"), 1000)


V1 = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


def mobilenet_v1_body(n: Net, width=1.0, act="relu6"):
    """Howard et al. 2017. Yields the output of every block."""
    x = n.conv(n.input, rounded(32 * width), 3, 2, act=act)
    for out, s in V1:
        x = n.conv(n.dw(x, 3, s, act), rounded(out * width), act=act)
        yield x


def mobilenet_v1(n: Net, width=1.0):
    *_, x = mobilenet_v1_body(n, width)
    return n.fc(n.mean(x), 1000)


def inverted(n: Net, x, expanded, out, k, s, act, squeeze=0, gate="hsigmoid", inner="relu"):
    """Inverted residual (Sandler et al. 2018)."""
    y = n.conv(x, expanded, act=act) if expanded != x.shape[1] else x
    y = n.dw(y, k, s, act)
    if squeeze:
        y = n.se(y, squeeze, inner, gate)
    y = n.conv(y, out, act=None)
    return n.add(x, y) if s == 1 and x.shape[1] == out else y


def mobilenet_v2(n: Net, width=1.0):
    x = n.conv(n.input, rounded(32 * width), 3, 2, act="relu6")
    for t, c, count, s in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    ):  # fmt: skip
        for i in range(count):
            x = inverted(n, x, x.shape[1] * t, rounded(c * width), 3, 1 if i else s, "relu6")
    x = n.conv(x, max(1280, rounded(1280 * width)), act="relu6")
    return n.fc(n.mean(x), 1000)


LARGE = [
    (3, 16, 16, 0, "relu", 1), (3, 64, 24, 0, "relu", 2), (3, 72, 24, 0, "relu", 1), (5, 72, 40, 1, "relu", 2),
    (5, 120, 40, 1, "relu", 1), (5, 120, 40, 1, "relu", 1), (3, 240, 80, 0, "hswish", 2),
    (3, 200, 80, 0, "hswish", 1), (3, 184, 80, 0, "hswish", 1), (3, 184, 80, 0, "hswish", 1),
    (3, 480, 112, 1, "hswish", 1), (3, 672, 112, 1, "hswish", 1), (5, 672, 160, 1, "hswish", 2),
    (5, 960, 160, 1, "hswish", 1), (5, 960, 160, 1, "hswish", 1),
]  # fmt: skip
SMALL = [
    (3, 16, 16, 1, "relu", 2), (3, 72, 24, 0, "relu", 2), (3, 88, 24, 0, "relu", 1), (5, 96, 40, 1, "hswish", 2),
    (5, 240, 40, 1, "hswish", 1), (5, 240, 40, 1, "hswish", 1), (5, 120, 48, 1, "hswish", 1),
    (5, 144, 48, 1, "hswish", 1), (5, 288, 96, 1, "hswish", 2), (5, 576, 96, 1, "hswish", 1),
    (5, 576, 96, 1, "hswish", 1),
]  # fmt: skip


def mobilenet_v3(n: Net, table, last, width=1.0, minimal=False):
    """Howard et al. 2019; `minimal`: no squeeze-excite, hard-swish or 5x5 kernels (TensorFlow's minimalistic)."""
    x = n.conv(n.input, rounded(16 * width), 3, 2, act="relu" if minimal else "hswish")
    for k, expanded, out, se, act, s in table:
        wide = rounded(expanded * width)
        squeeze = rounded(wide / 4) if se and not minimal else 0
        x = inverted(
            n, x, wide, rounded(out * width), 3 if minimal else k, s, "relu" if minimal else act, squeeze
        )
    act = "relu" if minimal else "hswish"
    x = n.conv(x, 6 * x.shape[1], act=act)
    return n.fc(n.fc(n.mean(x), last, act), 1000)


B0 = [
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 40, 5, 2, 2),
    (6, 80, 3, 2, 3),
    (6, 112, 5, 1, 3),
    (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1),
]


def efficientnet(n: Net, width=1.0, depth=1.0, lite=False):
    """Tan and Le 2019; `lite`: ReLU6, no squeeze-excite, fixed stem and head."""
    act = "relu6" if lite else "silu"
    x = n.conv(n.input, 32 if lite else rounded(32 * width), 3, 2, act=act)
    for i, (t, c, k, s, count) in enumerate(B0):
        repeats = count if lite and i in (0, len(B0) - 1) else -int(-count * depth // 1)
        for j in range(repeats):
            inputs = x.shape[1]
            squeeze = 0 if lite else max(1, inputs // 4)
            x = inverted(
                n, x, inputs * t, rounded(c * width), k, 1 if j else s, act, squeeze, "sigmoid", "silu"
            )
    x = n.conv(x, 1280 if lite else rounded(1280 * width), act=act)
    return n.fc(n.mean(x), 1000)


def squeezenet(n: Net, old: bool):
    """Iandola et al. 2016, versions 1.0 and 1.1."""
    x = n.conv(n.input, 96, 7, 2, pad=0) if old else n.conv(n.input, 64, 3, 2, pad=0)
    fires = [(16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)]
    pools = (0, 3, 7) if old else (0, 2, 4)
    for i, (squeeze, out) in enumerate(fires):
        if i in pools:
            x = n.pool(x, 3, 2, 0, ceil=True)
        y = n.conv(x, squeeze)
        x = n.cat(n.conv(y, out), n.conv(y, out, 3))
    return n.mean(n.conv(x, 1000))


def googlenet(n: Net):
    """Szegedy et al. 2015 as torchvision has it (3x3 in place of 5x5)."""

    def inception(x, a, b0, b1, c0, c1, d):
        branches = n.conv(x, a), n.conv(n.conv(x, b0), b1, 3), n.conv(n.conv(x, c0), c1, 3)
        return n.cat(*branches, n.conv(n.pool(x, 3, 1), d))

    x = n.pool(n.conv(n.input, 64, 7, 2), 3, 2, 0, ceil=True)
    x = n.pool(n.conv(n.conv(x, 64), 192, 3), 3, 2, 0, ceil=True)
    x = inception(inception(x, 64, 96, 128, 16, 32, 32), 128, 128, 192, 32, 96, 64)
    x = inception(n.pool(x, 3, 2, 0, ceil=True), 192, 96, 208, 16, 48, 64)
    x = inception(inception(x, 160, 112, 224, 24, 64, 64), 128, 128, 256, 24, 64, 64)
    x = inception(inception(x, 112, 144, 288, 32, 64, 64), 256, 160, 320, 32, 128, 128)
    x = n.pool(x, 2, 2, 0, ceil=True)
    x = inception(inception(x, 256, 160, 320, 32, 128, 128), 384, 192, 384, 48, 128, 128)
    return n.fc(n.mean(x), 1000)


def inception_v3(n: Net):
    """Szegedy et al. 2016 as torchvision has it."""
    x = n.conv(n.conv(n.input, 32, 3, 2, pad=0), 32, 3, pad=0)
    x = n.pool(n.conv(x, 64, 3), 3, 2, 0)
    x = n.pool(n.conv(n.conv(x, 80), 192, 3, pad=0), 3, 2, 0)

    def average(x, out):
        return n.conv(n.pool(x, 3, 1, op="AveragePool"), out)

    for out in (32, 64, 64):
        a, b = n.conv(x, 64), n.conv(n.conv(x, 48), 64, 5)
        x = n.cat(a, b, n.conv(n.conv(n.conv(x, 64), 96, 3), 96, 3), average(x, out))
    x = n.cat(
        n.conv(x, 384, 3, 2, pad=0), n.conv(n.conv(n.conv(x, 64), 96, 3), 96, 3, 2, pad=0), n.pool(x, 3, 2, 0)
    )
    for c in (128, 160, 160, 192):
        b = n.conv(n.conv(n.conv(x, c), c, (1, 7)), 192, (7, 1))
        d = n.conv(n.conv(n.conv(n.conv(x, c), c, (7, 1)), c, (1, 7)), c, (7, 1))
        x = n.cat(n.conv(x, 192), b, n.conv(d, 192, (1, 7)), average(x, 192))
    b = n.conv(n.conv(n.conv(n.conv(x, 192), 192, (1, 7)), 192, (7, 1)), 192, 3, 2, pad=0)
    x = n.cat(n.conv(n.conv(x, 192), 320, 3, 2, pad=0), b, n.pool(x, 3, 2, 0))
    for _ in range(2):
        b, d = n.conv(x, 384), n.conv(n.conv(x, 448), 384, 3)
        forks = [n.conv(y, 384, k) for y in (b, d) for k in ((1, 3), (3, 1))]
        x = n.cat(n.conv(x, 320), *forks, average(x, 192))
    return n.fc(n.mean(x), 1000)


def shuffle(n: Net, x, groups=2):
    _, c, h, w = x.shape
    y = n.transpose(n.reshape(x, 1, groups, c // groups, h, w), 0, 2, 1, 3, 4)
    return n.reshape(y, 1, c, h, w)


def shufflenet_v2(n: Net, channels=(116, 232, 464), last=1024):
    """Ma et al. 2018, 1.0x."""
    x = n.pool(n.conv(n.input, 24, 3, 2), 3, 2)
    for out, count in zip(channels, (4, 8, 4), strict=True):
        half = out // 2
        left = n.conv(n.dw(x, 3, 2, None), half)
        right = n.conv(n.dw(n.conv(x, half), 3, 2, None), half)
        x = shuffle(n, n.cat(left, right))
        for _ in range(count - 1):
            left, right = n.halves(x)
            x = shuffle(n, n.cat(left, n.conv(n.dw(n.conv(right, half), 3, 1, None), half)))
    return n.fc(n.mean(n.conv(x, last)), 1000)


def regnet_y(n: Net, widths, depths, group):
    """Radosavovic et al. 2020."""
    x = n.conv(n.input, 32, 3, 2)
    for out, count in zip(widths, depths, strict=True):
        for i in range(count):
            s, inputs = (1 if i else 2), x.shape[1]
            y = n.conv(n.conv(x, out), out, 3, s, out // group)
            y = n.conv(n.se(y, round(inputs / 4), gate="sigmoid"), out, act=None)
            x = n.add(y, x if s == 1 and inputs == out else n.conv(x, out, 1, s, act=None), "relu")
    return n.fc(n.mean(x), 1000)


NETWORKS = {
    "resnet18": partial(resnet, blocks=(2, 2, 2, 2), bottleneck=False),
    "resnet34": partial(resnet, blocks=(3, 4, 6, 3), bottleneck=False),
    "resnet50": partial(resnet, blocks=(3, 4, 6, 3), bottleneck=True),
    "resnet101": partial(resnet, blocks=(3, 4, 23, 3), bottleneck=True),
    "resnext50_32x4d": partial(resnet, blocks=(3, 4, 6, 3), bottleneck=True, width=128, groups=32),
    "wide_resnet50_2": partial(resnet, blocks=(3, 4, 6, 3), bottleneck=True, width=128),
    "seresnet50": partial(resnet, blocks=(3, 4, 6, 3), bottleneck=True, se=True),
    "vgg16": partial(vgg, counts=(2, 2, 3, 3, 3)),
    "vgg19": partial(vgg, counts=(2, 2, 4, 4, 4)),
    "mobilenet_v1": mobilenet_v1,
    "mobilenet_v1_0.25": partial(mobilenet_v1, width=0.25),
    "mobilenet_v1_0.50": partial(mobilenet_v1, width=0.5),
    "mobilenet_v1_0.75": partial(mobilenet_v1, width=0.75),
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3_large": partial(mobilenet_v3, table=LARGE, last=1280),
    "mobilenet_v3_large_0.75": partial(mobilenet_v3, table=LARGE, last=1280, width=0.75),
    "mobilenet_v3_large_minimalistic": partial(mobilenet_v3, table=LARGE, last=1280, minimal=True),
    "mobilenet_v3_small": partial(mobilenet_v3, table=SMALL, last=1024),
    "efficientnet_b0": efficientnet,
    "efficientnet-lite0": partial(efficientnet, lite=True),
    "efficientnet-lite1": partial(efficientnet, lite=True, width=1.0, depth=1.1),
    "efficientnet-lite2": partial(efficientnet, lite=True, width=1.1, depth=1.2),
    "efficientnet-lite3": partial(efficientnet, lite=True, width=1.2, depth=1.4),
    "efficientnet-lite4": partial(efficientnet, lite=True, width=1.4, depth=1.8),
    "squeezenet1_0": partial(squeezenet, old=True),
    "squeezenet1_1": partial(squeezenet, old=False),
    "googlenet": googlenet,
    "inception_v3": inception_v3,
    "shufflenet_v2": shufflenet_v2,
    "regnetY200": partial(regnet_y, widths=(24, 56, 152, 368), depths=(1, 1, 4, 7), group=8),
    "regnetY400": partial(regnet_y, widths=(48, 104, 208, 440), depths=(1, 3, 6, 6), group=8),
    "regnetY600": partial(regnet_y, widths=(48, 112, 256, 608), depths=(1, 3, 7, 4), group=16),
    "regnetY800": partial(regnet_y, widths=(64, 144, 320, 784), depths=(1, 3, 8, 2), group=16),
}
