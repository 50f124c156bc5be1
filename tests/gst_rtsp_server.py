"""A real RTSP server on loopback, by libgstrtspserver: `python gst_rtsp_server.py CODEC [PORT [USER:PASSWORD]]`.

Prints the port when it listens and runs until it is killed. Codecs: h264 (x264enc), jpeg (jpegenc), vp8 (vp8enc).
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import c_char_p, c_int, c_size_t, c_void_p

PICTURE = (
    "videotestsrc is-live=true pattern=ball ! video/x-raw,format=I420,width=320,height=240,framerate=30/1"
)
CODECS = {
    "h264": "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=10 ! rtph264pay config-interval=1",
    "jpeg": "jpegenc ! rtpjpegpay",
    "vp8": "vp8enc deadline=1 keyframe-max-dist=10 ! rtpvp8pay",
}
G_TYPE_BOOLEAN, G_TYPE_STRING = 5 << 2, 16 << 2


def functions(name: str, table: dict[str, tuple[object, tuple[object, ...]]]) -> ctypes.CDLL:
    library = ctypes.CDLL(name)
    for function, (result, arguments) in table.items():
        call = getattr(library, function)
        call.restype, call.argtypes = result, arguments
    return library


def main(codec: str, port: str = "0", login: str = "") -> None:
    p, s = c_void_p, c_char_p
    gst = functions("libgstreamer-1.0.so.0", {"gst_init": (None, (p, p))})
    glib = functions(
        "libglib-2.0.so.0", {"g_main_loop_new": (p, (p, c_int)), "g_main_loop_run": (None, (p,))}
    )
    rtsp = functions(
        "libgstrtspserver-1.0.so.0",
        {
            "gst_rtsp_server_new": (p, ()),
            "gst_rtsp_server_set_address": (None, (p, s)),
            "gst_rtsp_server_set_service": (None, (p, s)),
            "gst_rtsp_server_get_bound_port": (c_int, (p,)),
            "gst_rtsp_server_get_mount_points": (p, (p,)),
            "gst_rtsp_server_attach": (c_int, (p, p)),
            "gst_rtsp_server_set_auth": (None, (p, p)),
            "gst_rtsp_media_factory_new": (p, ()),
            "gst_rtsp_media_factory_set_launch": (None, (p, s)),
            "gst_rtsp_media_factory_set_shared": (None, (p, c_int)),
            "gst_rtsp_mount_points_add_factory": (None, (p, s, p)),
            "gst_rtsp_auth_new": (p, ()),
            "gst_rtsp_auth_make_basic": (p, (s, s)),
            "gst_rtsp_auth_add_basic": (None, (p, p, p)),
        },
    )
    gst.gst_init(None, None)
    server = rtsp.gst_rtsp_server_new()
    rtsp.gst_rtsp_server_set_address(server, b"127.0.0.1")
    rtsp.gst_rtsp_server_set_service(server, port.encode())
    factory = rtsp.gst_rtsp_media_factory_new()
    launch = f"( {PICTURE} ! {CODECS[codec]} name=pay0 pt={26 if codec == 'jpeg' else 96} )"
    rtsp.gst_rtsp_media_factory_set_launch(factory, launch.encode())
    rtsp.gst_rtsp_media_factory_set_shared(factory, 1)
    if login:
        role = ctypes.CDLL("libgstrtspserver-1.0.so.0")
        new_token = role.gst_rtsp_token_new  # (name, type, value, ..., NULL)
        new_token.restype, new_token.argtypes = p, (s, c_size_t, s)
        token = new_token(b"media.factory.role", G_TYPE_STRING, b"user", p(None))
        allow = role.gst_rtsp_media_factory_add_role  # (factory, role, permission, type, value, ..., NULL)
        allow.restype, allow.argtypes = None, (p, s, s, c_size_t, c_int, s, c_size_t, c_int)
        access, construct = b"media.factory.access", b"media.factory.construct"
        allow(factory, b"user", access, G_TYPE_BOOLEAN, 1, construct, G_TYPE_BOOLEAN, 1, p(None))
        auth = rtsp.gst_rtsp_auth_new()
        user, _, password = login.partition(":")
        basic = rtsp.gst_rtsp_auth_make_basic(user.encode(), password.encode())
        rtsp.gst_rtsp_auth_add_basic(auth, basic, token)
        rtsp.gst_rtsp_server_set_auth(server, auth)
    rtsp.gst_rtsp_mount_points_add_factory(rtsp.gst_rtsp_server_get_mount_points(server), b"/street", factory)
    if not rtsp.gst_rtsp_server_attach(server, None):
        sys.exit(f"port {port} cannot be had")
    print(rtsp.gst_rtsp_server_get_bound_port(server), flush=True)
    glib.g_main_loop_run(glib.g_main_loop_new(None, 0))


if __name__ == "__main__":
    main(*sys.argv[1:])
