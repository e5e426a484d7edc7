"""Where features are compared: neck, backbone, both, or the eight layers of the published code."""

# Numbers are layers of YOLOv8 (the same in n and s): 4, 6, 9 end the backbone at strides 8, 16, 32; 15, 18, 21 are what the
# head reads. Other families number differently: YOLO11 and 26 have 4, 6, 10 and 16, 19, 22.
SPACE = {
    "distill.taps": [
        (15, 18, 21),
        (4, 6, 9),
        (4, 6, 9, 15, 18, 21),
        (2, 4, 6, 8, 12, 15, 18, 21),
    ]
}
SEEDS = (0, 1, 2)
