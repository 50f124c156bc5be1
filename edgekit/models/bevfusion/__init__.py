"""BEVFusion: cameras and a LiDAR in one bird's-eye view (Liu et al. 2023, arXiv:2205.13542), in torch.

    model = BEVFusion(LITE)                            # model.py; settings in config.py
    sample = prepare(frame, LITE)                      # inputs.py: a `rig.RigFrame` as the network takes it
    out = model(collate([sample], LITE))               # raw maps, see head.py
    export_segments(model, folder)                     # export.py: the plan that engines run, see docs/fusion.md

One part a file: camera (backbone, FPN, lift to depth), pool (depth x features to cells), lidar (sparse encoder), bev
(fusers, decoder), head, loss. Weights start random; nothing is downloaded.
"""
