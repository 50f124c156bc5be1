"""What `gst:`, `csi:`, `usb:` and `rtsp:` mean: URI -> GStreamer pipeline. Text only; nothing is opened here."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from edgekit.errors import UsageError, did_you_mean
from edgekit.runtime.frames import Hop
from edgekit.runtime.sources.base import split_uri

SINK = "edgekit-sink"
CAMERA = "edgekit-camera"
FORMATS = {
    "YUY2": "yuyv",
    "UYVY": "uyvy",
    "NV12": "nv12",
    "NV21": "nv21",
    "I420": "i420",
    "GRAY8": "grey",
    "BGR": "bgr",
    "RGB": "rgb",
    "BGRx": "bgra",
    "BGRA": "bgra",
    "RGBx": "rgba",
    "RGBA": "rgba",
}
"""GStreamer's names of what the kernels read -> ours; a converter takes the first that loses least."""
SINK_CAPS = f"video/x-raw,format=(string){{{','.join(FORMATS)}}}"
JETSON_COPY = "nvvidconv ! video/x-raw,format=NV12"
"""From NVMM, which only NVIDIA's hardware addresses, to memory that can be mapped; done by its converter, not the CPU."""
_BASE, _GOOD = "gstreamer1.0-plugins-base", "gstreamer1.0-plugins-good"
_PACKAGES = {
    "appsink": _BASE, "videotestsrc": _BASE, "videoconvert": _BASE, "videoscale": _BASE, "videorate": _BASE,
    "decodebin": _BASE, "uridecodebin": _BASE, "v4l2src": _GOOD, "jpegdec": _GOOD, "jpegenc": _GOOD,
    "rtspsrc": _GOOD, "udpsrc": _GOOD, "multifilesrc": _GOOD, "vp8dec": _GOOD, "matroskademux": _GOOD,
    "qtdemux": _GOOD, "rtph264depay": _GOOD, "rtpjpegdepay": _GOOD, "x264enc": "gstreamer1.0-plugins-ugly",
    "h264parse": "gstreamer1.0-plugins-bad", "h265parse": "gstreamer1.0-plugins-bad",
    "openh264dec": "gstreamer1.0-plugins-bad", "libcamerasrc": "gstreamer1.0-libcamera",
    "tcambin": "tiscamera",
}  # fmt: skip
"""Element -> Debian package."""
_SECRET_KEYS = re.compile(r"(pass|pwd|secret|token|auth|key|user|login|cred)", re.IGNORECASE)
_HIDDEN = "***"


@dataclass(frozen=True)
class Pipeline:
    """uri: what may be printed. launch: the description. arguments: (element, property, value), set apart from the
    description, so that nothing has to be quoted. camera: frames never end; the end means that it is gone.
    direct: the driver's buffers reach the appsink. secrets: what no message may hold. hops: what moves frames
    before the appsink gets them."""

    uri: str
    launch: str
    arguments: tuple[tuple[str, str, str], ...] = ()
    camera: bool = False
    direct: bool = False
    secrets: tuple[str, ...] = ()
    hops: tuple[Hop, ...] = ()

    def hide(self, text: str) -> str:
        """`text` without passwords."""
        for secret in self.secrets:
            text = text.replace(secret, _HIDDEN)
        return text


def package_of(element: str) -> str:
    """The line that installs an element."""
    if element.startswith("nv"):
        return "It comes with JetPack: apt install nvidia-l4t-gstreamer"
    package = "gstreamer1.0-libav" if element.startswith("avdec_") else _PACKAGES.get(element)
    if package:
        return f"Run: apt install {package}"
    return f"Check the name; 'gst-inspect-1.0' lists what is installed, 'apt-file search {element}' may know more"


def pipeline(uri: str, has: Callable[[str], bool]) -> Pipeline:
    """The pipeline of a URI. has: whether an element is installed. Raises: UsageError."""
    scheme, _, rest = uri.partition(":")
    scheme = scheme.lower()
    if scheme == "gst":
        return _described(uri, rest)
    if scheme in ("rtsp", "rtsps"):
        return _network(uri, scheme, has)
    return (_csi if scheme == "csi" else _usb)(uri, rest)


def _described(uri: str, text: str) -> Pipeline:
    # open_source shows control characters escaped; between elements a line break is a space
    text = re.sub(r"\\[nt]|\s", " ", text).strip()
    secrets = _inline_secrets(text)
    for secret in secrets:
        uri = uri.replace(secret, _HIDDEN)
    if not text:
        raise UsageError(
            f"source {uri}: no pipeline. Give one as gst-launch-1.0 takes it, such as gst:videotestsrc ! appsink"
        )
    sinks = len(re.findall(r"(?:^|[\s!])appsink(?=\s|$)", text))
    if sinks > 1:
        raise UsageError(
            f"source {uri}: {sinks} appsinks, expected one. Open one source per camera, or compose them first"
        )
    return Pipeline(uri, text if sinks else f"{text} ! appsink name={SINK}", secrets=secrets)


def _inline_secrets(text: str) -> tuple[str, ...]:
    """Passwords in a description: `user-pw=`, and those in addresses."""
    found = re.findall(r"\buser-pw\s*=\s*\"?([^\s\"!]+)", text)
    found += re.findall(r"[a-z]+://[^\s/@\"]*?:([^\s/@\"]+)@", text)
    return tuple(found)


def _csi(uri: str, rest: str) -> Pipeline:
    """NVIDIA's camera stack: sensor -> ISP -> NVMM -> system memory. Cannot run outside a Jetson."""
    device, query = _query(uri, rest, ("size", "fps"))
    if not re.fullmatch(r"[0-9]{1,2}", device or "0"):
        raise UsageError(f"source {uri}: sensor {device!r}, expected a number as in csi:0")
    width, height = _size(uri, query.get("size", "1280x720"))
    rate = _rate(uri, query.get("fps", "30"))
    nvmm = f"video/x-raw(memory:NVMM),format=NV12,width={width},height={height},framerate={rate}"
    launch = f"nvarguscamerasrc name={CAMERA} ! {nvmm} ! {JETSON_COPY} ! appsink name={SINK}"
    moved = Hop("nvvidconv: NVMM to system memory", "DMA", copied=width * height * 3 // 2)
    return Pipeline(uri, launch, ((CAMERA, "sensor-id", device or "0"),), camera=True, hops=(moved,))


def _usb(uri: str, rest: str) -> Pipeline:
    device, query = _query(uri, rest, ("size", "fps", "format"))
    path = f"/dev/video{device or 0}" if re.fullmatch(r"[0-9]{0,3}", device) else device
    if not path.startswith("/"):
        raise UsageError(
            f"source {uri}: device {device!r}, expected a number or a path as in usb:0 or usb:/dev/video0"
        )
    size = "width={},height={}".format(*_size(uri, query.get("size", "1280x720")))
    rate = f"framerate={_rate(uri, query.get('fps', '30'))}"
    format = query.get("format", "")
    names = {ours: theirs for theirs, ours in reversed(FORMATS.items())}
    if format != "mjpeg" and format and format not in names:
        raise UsageError(
            f"source {uri}: unknown format {format!r}. {did_you_mean(format, ('mjpeg', *names))}"
        )
    kind = "image/jpeg" if format == "mjpeg" else "video/x-raw"
    must = [kind, *([f"format={names[format]}"] if format in names else [])]
    must += [text for key, text in (("size", size), ("fps", rate)) if key in query]
    # v4l2src takes the first as what we would like, else it opens the largest picture at whatever rate
    like = [*must, *(text for text in (size, rate) if text not in must)]
    chain = ",".join(must) if like == must else f"{','.join(like)};{','.join(must)}"
    if format == "mjpeg":  # cameras compress 4:2:2, which jpegdec leaves in three planes
        chain += " ! jpegdec ! videoconvert"
    launch = f"v4l2src name={CAMERA} ! {chain} ! appsink name={SINK}"
    # `auto` exports the buffers as DMABUF, and maps and unmaps each picture
    arguments = ((CAMERA, "device", path), (CAMERA, "io-mode", "mmap"))
    return Pipeline(uri, launch, arguments, camera=True, direct=format != "mjpeg")


def _network(uri: str, scheme: str, has: Callable[[str], bool]) -> Pipeline:
    parts = split_uri(uri)
    ours = {"latency": "100", "protocols": "tcp"}
    theirs = []
    for item in filter(None, parts.query.split("&")):
        key, _, value = item.partition("=")
        if key in ours:
            ours[key] = value
        else:  # the camera's own: rtsp://host/cam?channel=1&subtype=0
            theirs.append((key, value))
    user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
    hidden = [(k, _HIDDEN if _SECRET_KEYS.search(k) and v else v) for k, v in theirs]
    host = parts.netloc.rpartition("@")[2]
    address = (scheme, host, parts.path, "&".join("=".join(i) for i in theirs), "")
    login = f"{_HIDDEN}@" if "@" in parts.netloc else ""
    shown = urllib.parse.urlunsplit(
        (scheme, login + host, parts.path, "&".join("=".join(i) for i in hidden), "")
    )
    try:
        bad = not parts.hostname or (parts.port is not None and not parts.port)
    except ValueError:  # no number, or above 65535
        bad = True
    if bad or not uri.lower().startswith(f"{scheme}://"):
        raise UsageError(f"source {shown}: no usable host, expected {scheme}://HOST[:PORT]/PATH")
    if not re.fullmatch(r"[0-9]{1,5}", ours["latency"]):
        raise UsageError(
            f"source {shown}: latency {ours['latency'][:20]!r}, expected milliseconds, 0 to 99999"
        )
    if ours["protocols"] not in ("tcp", "udp"):
        raise UsageError(f"source {shown}: protocols {ours['protocols'][:20]!r}, expected tcp or udp")
    # Jetson's decoders give NVMM; elsewhere nothing is converted unless it must be
    convert = JETSON_COPY if has("nvvidconv") else "videoconvert"
    launch = (
        f"rtspsrc name={CAMERA} ! application/x-rtp,media=video ! decodebin ! {convert} ! appsink name={SINK}"
    )
    arguments = [
        (CAMERA, "location", urllib.parse.urlunsplit(address)),
        (CAMERA, "latency", ours["latency"]),
        (CAMERA, "drop-on-latency", "true"),
        (CAMERA, "protocols", "tcp+tls" if scheme == "rtsps" else ours["protocols"]),
        (CAMERA, "tcp-timeout", "5000000"),  # microseconds: 20 s by default
    ]
    if login:
        arguments += [(CAMERA, "user-id", user), (CAMERA, "user-pw", password)]
    secrets = [s for s in (password, parts.password, *(v for k, v in theirs if _SECRET_KEYS.search(k))) if s]
    return Pipeline(shown, launch, tuple(arguments), camera=True, secrets=tuple(secrets))


def _query(uri: str, rest: str, keys: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """(what stands before `?`, the keys behind it)."""
    device, _, text = rest.partition("?")
    found: dict[str, str] = {}
    for item in filter(None, text.split("&")):
        key, _, value = item.partition("=")
        if key not in keys:
            raise UsageError(f"source {uri}: unknown key {key!r}. {did_you_mean(key, keys)}")
        if key in found:
            raise UsageError(f"source {uri}: key {key!r} is given twice. Leave one out")
        if value:
            found[key] = value
    return device.removeprefix("//"), found


def _size(uri: str, text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if not match:
        raise UsageError(f"source {uri}: size {text[:40]!r} is not usable, expected WIDTHxHEIGHT")
    return int(match[1]), int(match[2])


def _rate(uri: str, text: str) -> str:
    """As a fraction, which is how caps have it: 30/1, 30000/1001."""
    match = re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3}|/[1-9][0-9]{0,4})?", text)
    rate = Fraction(text) if match else Fraction(0)
    television = Fraction(round(rate * 1001 / 1000) * 1000, 1001)  # 29.97 is said, 30000/1001 is meant
    if rate.denominator > 1 and abs(rate - television) < Fraction(1, 200):
        rate = television
    if not 0 < rate <= 1000:
        raise UsageError(f"source {uri}: fps {text[:40]!r} is not usable, expected above 0 up to 1000")
    return f"{rate.numerator}/{rate.denominator}"
