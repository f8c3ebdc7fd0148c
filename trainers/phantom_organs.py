"""The anatomy of a phantom, drawn back to front into a `Scene`; lengths in mm, densities in HU."""

from __future__ import annotations

import numpy as np

from trainers.phantom_scene import FAR, WHOLE, Array, Scene, Vec3

LABELS: dict[str, int] = {
    "liver": 1,
    "spleen": 2,
    "kidney_right": 3,
    "kidney_left": 4,
    "aorta": 5,
    "liver_lesion": 6,
}


def draw_anatomy(scene: Scene) -> None:
    """Draw everything; later parts hide earlier ones."""
    _trunk(scene)
    _skeleton(scene)
    _chest(scene)
    _bowel(scene)
    _vessels(scene)
    _liver(scene)
    _spleen(scene)
    _kidneys(scene)
    _aorta(scene)


def _trunk(scene: Scene) -> None:
    """Table, skin, subcutaneous fat, muscle wall, and the cavity that later organs are clipped to."""
    p, rng = scene.patient, scene.rng
    x, y, z = scene.plain
    waist = 1 - rng.uniform(0.02, 0.07) * np.exp(-(((z - 60) / 60) ** 2)) - 0.05 * ((z - 120) / 120) ** 2
    u, v = np.abs(x) / (p.rx * waist), np.abs(y) / (p.ry * waist * np.where(y > 0, 0.84, 1.0))
    ratio = (u**2.3 + v**2.3) ** (1 / 2.3) + 1e-4
    radius = np.sqrt(x * x + y * y) + 1
    body = (radius * (1 - 1 / ratio)).astype(np.float32) + scene.field(3.0, (4, 4, 3))
    front, behind = np.clip(-y / radius, 0, 1), np.clip(y / radius, 0, 1)
    fat = p.fat * (0.75 + 0.5 * behind + rng.uniform(0.1, 0.4) * front)
    scene.fascia = (body + fat).astype(np.float32) + scene.field(1.2, (7, 7, 4))
    rectus = np.clip(np.abs(x) / 7, 0.3, 1) * np.clip(1.6 - np.abs(x) / 50, 0.5, 1)
    wall = p.wall * (1 - front**3 * (1 - rectus))
    scene.cavity = (scene.fascia + wall).astype(np.float32)
    scene.wall = scene.cavity.copy()

    top = p.ry * 0.84 + 6 - x * x / 1500 + 0 * z
    across = np.abs(x) - 185
    scene.paint(WHOLE, np.maximum(np.abs(y - top - 9) - 9, across), -930.0, inside=False)
    for depth in (0, 18):
        scene.paint(WHOLE, np.maximum(np.abs(y - top - depth) - 1.2, across), -60.0, inside=False)
    scene.paint(WHOLE, body, 10.0, inside=False)
    scene.paint(WHOLE, body + 2.2, scene.fat_hu + scene.field(4, (20, 20, 10)), inside=False)
    muscle = p.hu(50, 9) + scene.field(6, (22, 22, 8))
    scene.paint(WHOLE, scene.fascia, muscle, inside=False)
    plane = np.abs(scene.cavity + 0.4 * p.wall - wall) - 0.4
    flank = np.where((np.abs(x) / radius > 0.6) & (z < 150), plane, FAR).astype(np.float32)
    scene.paint(WHOLE, flank, -30.0, inside=False)
    scene.paint(WHOLE, scene.cavity, scene.fat_hu + scene.field(6, (24, 24, 12)), inside=False)


def _skeleton(scene: Scene) -> None:
    """Muscles of the back, spine, ribs."""
    p, rng = scene.patient, scene.rng
    muscle = p.hu(50, 9)
    back = p.ry * 0.84 - p.fat - 44  # the middle of the vertebral canal
    scene.back = back
    for side in (-1, 1):
        columns: list[tuple[Vec3, Vec3]] = [
            ((side * 32, back + 17, 120), (33, 24, 400)),
            ((side * 38, back - 14, 30), (19, 19, 95)),
            ((side * 62, back + 2, 40), (20, 9, 85)),
        ]
        for centre, radii in columns:
            box, distance = scene.ellipsoid(centre, radii, rough=1.2)
            distance = np.maximum(distance, scene.fascia[box])
            streaks = muscle + scene.field(9, (30, 30, 8), box)
            scene.paint(box, distance, streaks, inside=False)
            scene.cavity[box] = np.maximum(scene.cavity[box], 1.5 - distance)

    box = scene.box((0, back, 120), (55, 48, 130))
    x, y, z = scene.at(box)
    y = y - np.float32(back)
    level = (z + rng.uniform(0, 33)) % 33
    disc = np.abs(level - 16.5) - 11.5  # above 0: intervertebral disc
    body = (np.sqrt((x / 23) ** 2 + ((y + 20) / 16) ** 2) - 1) * 17
    body += np.where(disc > 0, 0.0, np.abs(disc) / 6)
    arch = np.maximum(np.abs(np.sqrt(x * x + y * y * 1.2) - 12.5) - 4, -y - 9)
    spinous = np.maximum(np.abs(x) - 3.5, np.maximum(10 - y, y - 34))
    transverse = np.maximum(np.abs(y - 2) + np.abs(x) / 12 - 5.5, np.maximum(np.abs(x) - 34, 10 - np.abs(x)))
    arch = np.where(level > 8, np.minimum(arch, spinous), arch + 1.5)
    bone = np.minimum(body, np.where(np.abs(level - 20) < 8, np.minimum(arch, transverse), arch))
    marrow = rng.uniform(140, 210) + scene.field(22, (40, 40, 14), box)
    density = np.where(bone > -2.2, marrow + 230, marrow)
    density = np.where((disc > 0) & (y < -4), 85.0, density).astype(np.float32)
    scene.paint(box, bone, density, inside=False)
    canal = np.sqrt(x * x + y * y) - 8.5
    scene.paint(box, canal, 25.0, inside=False)
    scene.paint(box, np.sqrt(x * x + (y * 1.1) ** 2) - 5.0, 38.0, inside=False)
    scene.cavity[box] = np.maximum(scene.cavity[box], 2.0 - bone)

    x, y, z = scene.plain
    turn = np.arctan2(np.abs(x), y) / np.pi + 0 * z  # 0 at the spine, 1 at the sternum
    slant = z + rng.uniform(120, 150) * np.minimum(turn, 0.75) + rng.uniform(0, 27)
    rib = np.abs(slant % 27 - 13.5) / 6
    shell = (scene.wall - 0.45 * p.wall) / 3.4
    lowest = 90 + 30 * np.clip((turn - 0.55) / 0.2, 0, 1)
    keep = (turn > 0.12) & (turn < 0.78) & (slant - 13.5 > lowest + 75)
    distance = np.where(keep, (np.sqrt(rib**2 + shell**2) - 1) * 4, FAR).astype(np.float32)
    scene.paint(WHOLE, distance, np.where(distance < -1.8, 180.0, 420.0), inside=False)


def _chest(scene: Scene) -> None:
    """Lung bases and heart above the diaphragm, which becomes the roof of the cavity."""
    p, rng = scene.patient, scene.rng
    x, y, z = scene.at(WHOLE)
    top = rng.uniform(206, 226)
    inner = p.rx - p.fat - p.wall
    reach_y = p.ry - p.fat - p.wall
    dome = np.full(scene.shape, -FAR, np.float32)
    for side, drop in ((-1, 0.0), (1, rng.uniform(6, 16))):
        fall = ((x - side * 0.48 * inner) / (0.62 * inner)) ** 2 + ((y + 8) / (0.95 * reach_y)) ** 2
        dome = np.maximum(dome, (top - drop) - 62 * fall)
    dome = np.maximum(dome, top - 78)
    lung = np.maximum(np.maximum(dome - z + 2.0, scene.cavity + 2.0), (32 - np.abs(x - 4)) * 0.9)
    air = -860 + scene.field(25, (30, 30, 14))
    vessels = scene.field(1.0, (50, 50, 20)) > 1.9
    scene.paint(WHOLE, lung, np.where(vessels, -350.0, air).astype(np.float32), inside=False)
    box, heart = scene.ellipsoid((20, -34, top + 20), (64, 54, 48), turn=0.5, rough=2)
    heart = np.maximum(heart, dome[box] - z[box] + 4)
    scene.paint(box, heart, p.hu(45, 85), gap=3.0)
    scene.cavity = np.maximum(scene.cavity, z - dome)


def _bowel(scene: Scene) -> None:
    """Stomach, colon, small bowel with fluid and gas, mesenteric vessels, pancreas."""
    p, rng = scene.patient, scene.rng
    front = -(p.ry - p.fat - p.wall)
    wide = p.rx - p.fat - p.wall
    for _ in range(70):
        start = (rng.uniform(-0.6, 0.6) * wide, rng.uniform(0.0, 0.7) * front, rng.uniform(0, 110))
        end = _near(rng, start, 14)
        box, vessel = scene.tube(start, end, rng.uniform(0.8, 1.8))
        scene.paint(box, vessel, p.hu(40, 80))
    for _ in range(48):
        centre = (rng.uniform(-0.62, 0.62) * wide, rng.uniform(0.1, 0.78) * front, rng.uniform(-5, 105))
        if centre[0] > 0:  # the jejunum reaches higher on the left
            centre = (centre[0], centre[1], centre[2] * 1.25)
        size = rng.uniform(10, 16)
        radii = (size * rng.uniform(1, 2), size, size * rng.uniform(0.8, 1.5))
        _loop(scene, centre, radii, content=rng.uniform(8, 45), gas=rng.random() < 0.2)
    for side, height in ((-1, 70.0), (1, 95.0)):  # ascending and descending colon
        x = side * (wide - rng.uniform(24, 32))
        for z in np.arange(0, height, 19):
            centre = (x + rng.normal(0, 4), rng.normal(12, 5), z)
            radii = (rng.uniform(15, 22), rng.uniform(16, 23), 14)
            _loop(scene, centre, radii, content=rng.uniform(25, 55), gas=rng.random() < 0.7, stool=True)
    sag = rng.uniform(10, 40)
    for t in np.linspace(-1, 1, 9):  # transverse colon
        centre = (t * (wide - 34), front + 22 + 8 * t * t, 104 - sag * (1 - t * t) + rng.normal(0, 4))
        _loop(scene, centre, (19, rng.uniform(13, 18), 17), content=rng.uniform(25, 55), gas=True, stool=True)
    _loop(
        scene,
        (rng.uniform(40, 55), -32 + rng.normal(0, 4), 163),
        (rng.uniform(34, 46), rng.uniform(34, 44), 46),
        content=rng.uniform(5, 35),
        gas=True,
        wall=4.0,
        turn=-0.6,
    )
    _loop(scene, (14, -34, 140), (40, 20, 17), content=rng.uniform(5, 35), gas=False, wall=4.0, turn=0.3)
    for t in np.linspace(0, 1, 7):  # pancreas, head to tail
        centre = (-26 + 92 * t, -16 + 34 * t - 46 * t * (1 - t), 118 + 34 * t)
        box, gland = scene.ellipsoid(centre, (14, 10, 13), rough=1.8)
        scene.paint(box, gland, p.hu(42, 52) + scene.field(8, (40, 40, 20), box), gap=1.0)


def _loop(
    scene: Scene,
    centre: Vec3,
    radii: Vec3,
    *,
    content: float,
    gas: bool,
    stool: bool = False,
    wall: float = 2.2,
    turn: float | None = None,
) -> None:
    """A piece of gut: enhancing wall, fluid or stool, gas floating in front."""
    p, rng = scene.patient, scene.rng
    angle = rng.uniform(-0.8, 0.8) if turn is None else turn
    box, gut = scene.ellipsoid(centre, radii, turn=angle, rough=2.0)
    scene.paint(box, gut, p.hu(35, 45), gap=1.2)
    lumen = np.maximum(gut + wall, scene.cavity[box] + 1 + wall)
    texture = scene.field(26 if stool else 4, (44, 44, 22), box)
    scene.paint(box, lumen, content + texture, inside=False)
    if gas:
        level = centre[1] + radii[1] * rng.uniform(-0.55, 0.25)
        air = np.maximum(lumen, scene.at(box)[1] - np.float32(level) + (texture / 8 if stool else 0))
        scene.paint(box, air, -940.0, inside=False)


def _vessels(scene: Scene) -> None:
    """The inferior vena cava."""
    p, rng = scene.patient, scene.rng
    ahead = scene.back - 50
    box = scene.box((-20, ahead, 120), (22, 22, 140))
    x, y, z = scene.at(box)
    centre = -20 - 4 * np.sin(z / 60)
    cava = np.sqrt(((x - centre) / 1.25) ** 2 + (y - ahead + z / 22) ** 2) - rng.uniform(8, 10.5)
    scene.paint(box, cava.astype(np.float32), p.hu(42, 88), inside=False, gap=1.0)


def _liver(scene: Scene) -> None:
    """Liver with vessels, gallbladder and, in most cases, fuzzy dark lesions."""
    p, rng = scene.patient, scene.rng
    wide, deep = p.rx - p.fat - p.wall, p.ry - p.fat - p.wall
    box = scene.box((-30, -10, 148), (wide, deep, 95))
    right = (-0.5 * wide, -2.0, rng.uniform(140, 152))
    _, lobe = scene.ellipsoid(right, (0.58 * wide, 0.92 * deep, rng.uniform(72, 88)), box=box)
    left = (rng.uniform(-14, 4), -0.55 * deep, rng.uniform(164, 174))
    radii = (rng.uniform(58, 82), 0.36 * deep, rng.uniform(32, 44))
    _, wing = scene.ellipsoid(left, radii, box=box, turn=0.16)
    blend = np.clip(0.5 + 0.5 * (lobe - wing) / 14, 0, 1)
    liver = lobe * (1 - blend) + wing * blend - 14 * blend * (1 - blend) + scene.field(3.2, (10, 10, 7), box)
    hilum = scene.ellipsoid((-4, 24, 112), (38, 34, 46), box=box)[1]
    loin = scene.ellipsoid((-44, scene.back - 8, 70), (50, 58, 74), box=box)[1]
    liver = np.maximum(np.maximum(liver, np.maximum(-hilum, -loin)), scene.cavity[box] + 0.6)
    texture = scene.field(3.5, (60, 60, 24), box) + scene.field(3, (9, 9, 6), box)
    density = rng.uniform(54, 62) + p.enhancement * rng.uniform(48, 58)
    scene.paint(box, liver, density + texture, label=LABELS["liver"], gap=rng.uniform(0.6, 2.2), inside=False)

    within = np.full(scene.shape, FAR, np.float32)
    within[box] = liver
    root, porta = (-18.0, 8.0, 196.0), (-24.0, -2.0, 138.0)
    branches: list[tuple[Vec3, Vec3, float]] = []
    for tip in ((-105, 12, 172), (-60, -50, 176), (0, -58, 178), (-88, -14, 158)):
        branches.append((root, _near(rng, tip, 7), rng.uniform(3.2, 4.8)))
    for tip in ((-60, 0, 140), (-100, 22, 128), (-92, -32, 136), (-14, -48, 160), (-70, 32, 160)):
        branches.append((porta, _near(rng, tip, 7), rng.uniform(3.0, 5.0)))
    for start, end, size in branches:
        spot, vessel = scene.tube(start, end, size)
        vessel = np.maximum(vessel, within[spot] + 5)
        scene.paint(spot, vessel, density + p.enhancement * 45, label=None, edge=3.5)

    _lesions(scene, within, density)
    spot, bladder = scene.ellipsoid(
        (-0.36 * wide, -0.42 * deep, rng.uniform(102, 112)), (rng.uniform(11, 16), 17, 24), rough=0.8
    )
    scene.paint(spot, bladder, p.hu(30, 30), gap=0.8)
    scene.paint(spot, bladder + 2.0, rng.uniform(4, 14))


def _lesions(scene: Scene, within: Array, density: float) -> None:
    p, rng = scene.patient, scene.rng
    count = int(rng.integers(1, 5)) if rng.random() < 0.7 else 0
    deep = np.argwhere(within < -14)
    for _ in range(count if len(deep) else 0):
        i, j, k = deep[rng.integers(len(deep))]
        x, y, z = (float(a[i, j, k]) for a in scene.organ)
        a, b, c = rng.uniform(6, 19) * rng.uniform(0.8, 1.2, 3)
        box, lesion = scene.ellipsoid((x, y, z), (a, b, c), rough=1.8)
        lesion = np.maximum(lesion, within[box] + 1.0)
        darker = density - p.enhancement * rng.uniform(34, 58) + scene.field(6, (40, 40, 20), box)
        scene.paint(box, lesion, darker, label=LABELS["liver_lesion"], edge=rng.uniform(4, 9), inside=False)


def _spleen(scene: Scene) -> None:
    p, rng = scene.patient, scene.rng
    wide, deep = p.rx - p.fat - p.wall, p.ry - p.fat - p.wall
    centre = (0.76 * wide, 0.3 * deep + rng.normal(0, 4), rng.uniform(158, 170))
    radii = (rng.uniform(28, 34), rng.uniform(42, 54), rng.uniform(40, 54))
    box, spleen = scene.ellipsoid(centre, radii, turn=rng.uniform(0.2, 0.5), rough=2.0)
    hollow = scene.ellipsoid((0.42 * wide, 2.0, centre[2]), (0.24 * wide, 40, 70), box=box)[1]
    spleen = np.maximum(np.maximum(spleen, -hollow), scene.cavity[box] + 0.8)
    density = rng.uniform(48, 54) + p.enhancement * rng.uniform(70, 80)
    texture = scene.field(3.5, (60, 60, 24), box)
    scene.paint(
        box, spleen, density + texture, label=LABELS["spleen"], gap=rng.uniform(0.6, 2.2), inside=False
    )


def _kidneys(scene: Scene) -> None:
    """Kidneys with cortex, medulla and a sinus of fat and urine open to the middle."""
    p, rng = scene.patient, scene.rng
    for side, name, height in ((-1, "kidney_right", 94.0), (1, "kidney_left", 106.0)):
        centre = (side * rng.uniform(60, 68), scene.back - rng.uniform(20, 28), height + rng.normal(0, 5))
        radii = (rng.uniform(24, 29), rng.uniform(26, 31), rng.uniform(46, 56))
        turn = -side * rng.uniform(0.3, 0.7)
        box, kidney = scene.ellipsoid(centre, radii, turn=turn, rough=1.5)
        mouth = (centre[0] - side * 17, centre[1] - 8, centre[2])
        sinus = scene.ellipsoid(mouth, (17, 10, 24), box=box, turn=turn, rough=1.5)[1]
        pyramids = scene.field(4.5, (30, 30, 18), box)
        medulla = np.clip(0.5 - (kidney + 8.0 + pyramids) / 3, 0, 1)
        density = p.hu(38, 160) - medulla * p.enhancement * rng.uniform(26, 42)
        scene.paint(box, kidney, density, label=LABELS[name], gap=rng.uniform(1.5, 5))
        scene.paint(box, np.maximum(sinus, kidney - 6), scene.fat_hu + 30)
        scene.paint(box, sinus + 6, p.hu(8, 30))


def _aorta(scene: Scene) -> None:
    """Aorta, sometimes with calcified plaques, and the renal arteries' stumps."""
    p, rng = scene.patient, scene.rng
    ahead = scene.back - 49
    box = scene.box((12, ahead, 120), (24, 24, 140))
    x, y, z = scene.at(box)
    middle, bend = rng.uniform(7, 14), rng.uniform(2, 6)
    dx = x - middle - bend * np.sin(z / 70 + rng.uniform(0, 6))
    dy = y - ahead + 2 * np.cos(z / 80)
    aorta = (np.sqrt(dx * dx + dy * dy) - rng.uniform(8.5, 11.5) - z / 110).astype(np.float32)
    for side in (-1, 1):
        spot, artery = scene.tube((middle, ahead, 112), (side * 52, ahead + 12, 104), 2.4)
        scene.paint(spot, artery, p.hu(42, 110))
    scene.paint(box, aorta, p.hu(42, 118), label=LABELS["aorta"], gap=0.8, inside=False)
    if rng.random() < 0.5:
        plaque = np.where(scene.field(1.0, (50, 50, 16), box) > 1.6, np.abs(aorta + 0.8) - 0.9, FAR)
        scene.paint(box, plaque.astype(np.float32), 500.0, label=None, inside=False)


def _near(rng: np.random.Generator, point: Vec3, spread: float) -> Vec3:
    x, y, z = (c + rng.normal(0, spread) for c in point)
    return x, y, z
