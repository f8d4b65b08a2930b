"""Well-known sets of photos: Food-101, Oxford-IIIT Pets, Oxford Flowers-102, Imagenette, Imagewoof.

Each reads the folder that its authors' archive unpacks to, in cfg.path or below it, with the
official splits and class names. Tiny-ImageNet-200 is there too. The photos are read as those of an
image folder are.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vit_scale.data import image_folder
from vit_scale.data.class_names import read_lines
from vit_scale.data.image_folder import ImageFolder, Listing
from vit_scale.errors import UserError
from vit_scale.storage import paths
from vit_scale.storage.errors import DAMAGED, user_errors

IMAGENETTE = {
    "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
    "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn",
    "n03417042": "garbage truck", "n03425413": "gas pump", "n03445777": "golf ball",
    "n03888257": "parachute",
}  # fmt: skip
IMAGEWOOF = {
    "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback", "n02088364": "beagle",
    "n02089973": "English foxhound", "n02093754": "Border terrier",
    "n02096294": "Australian terrier", "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog", "n02111889": "Samoyed", "n02115641": "dingo",
}  # fmt: skip
FLOWERS = tuple(
    """pink primrose,hard-leaved pocket orchid,canterbury bells,sweet pea,english marigold,
tiger lily,moon orchid,bird of paradise,monkshood,globe thistle,snapdragon,colt's foot,king protea,
spear thistle,yellow iris,globe-flower,purple coneflower,peruvian lily,balloon flower,
giant white arum lily,fire lily,pincushion flower,fritillary,red ginger,grape hyacinth,corn poppy,
prince of wales feathers,stemless gentian,artichoke,sweet william,carnation,garden phlox,
love in the mist,mexican aster,alpine sea holly,ruby-lipped cattleya,cape flower,great masterwort,
siam tulip,lenten rose,barbeton daisy,daffodil,sword lily,poinsettia,bolero deep blue,wallflower,
marigold,buttercup,oxeye daisy,common dandelion,petunia,wild pansy,primula,sunflower,pelargonium,
bishop of llandaff,gaura,geranium,orange dahlia,pink and yellow dahlia,cautleya spicata,
japanese anemone,black-eyed susan,silverbush,californian poppy,osteospermum,spring crocus,
bearded iris,windflower,tree poppy,gazania,azalea,water lily,rose,thorn apple,morning glory,
passion flower,lotus,toad lily,anthurium,frangipani,clematis,hibiscus,columbine,desert-rose,
tree mallow,magnolia,cyclamen,watercress,canna lily,hippeastrum,bee balm,ball moss,foxglove,
bougainvillea,camellia,mallow,mexican petunia,bromelia,blanket flower,trumpet creeper,
blackberry lily""".replace("\n", "").split(",")
)
MAT_ERRORS = (*DAMAGED, TypeError, IndexError)
FLOWERS_SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}
PETS_SPLITS = {"train": "trainval", "test": "test"}
# Folders that the archives unpack to, the first that exists.
FOLDERS = {
    "food101": ("food-101",),
    "pets": ("oxford-iiit-pet",),
    "flowers102": ("flowers-102",),
    "imagenette": ("imagenette2", "imagenette2-320", "imagenette2-160"),
    "imagewoof": ("imagewoof2", "imagewoof2-320", "imagewoof2-160"),
    "tiny_imagenet": ("tiny-imagenet-200",),
}


def _folder(cfg: ConfigDict, needed: str) -> Path:
    """Return the set's folder, which holds `needed`: cfg.path or one below it."""
    top = paths.parse(cfg.path)
    for folder in (*(top / name for name in FOLDERS[cfg.name]), top):
        if (folder / needed).exists():
            return folder
    raise UserError(
        f"{cfg.name} is not in {top}, which has no {FOLDERS[cfg.name][0]}/{needed}: run "
        f"`vit-scale data download {cfg.name} --out {top}`"
    )


def _lines(file: Path) -> list[str]:
    with user_errors(f"cannot read {file}", "download the set again"):
        return [line for line in read_lines(file) if line.strip()]


def _photos(
    cfg: ConfigDict, split: str, root: Path, files: list[str], labels: list[int], classes
) -> ImageFolder:
    """Return the source of the photos `files` below `root`."""
    if not files:
        raise UserError(f"the lists of {root.parent} name no photo of split {split!r}")
    names = np.array([file.encode() for file in files])
    listing = Listing(root, names, np.array(labels, np.int32), tuple(classes))
    return ImageFolder(f"{cfg.name} {split}", tuple(classes), listing, cfg)


def food101(cfg: ConfigDict, split: str) -> ImageFolder:
    """Read Food-101 (Bossard et al. 2014): 75,750 and 25,250 photos."""
    folder = _folder(cfg, "meta")
    classes = _lines(folder / "meta" / "classes.txt")
    photos = _lines(folder / "meta" / f"{split}.txt")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [_number(numbers, photo.partition("/")[0], folder) for photo in photos]
    files = [f"{photo}.jpg" for photo in photos]
    readable = [name.replace("_", " ") for name in classes]
    return _photos(cfg, split, folder / "images", files, labels, readable)


def _number(numbers: dict[str, int], name: str, folder: Path) -> int:
    if name not in numbers:
        raise UserError(f"{folder / 'meta'}: class {name!r} is not in classes.txt")
    return numbers[name]


def pets(cfg: ConfigDict, split: str) -> ImageFolder:
    """Read Oxford-IIIT Pets (Parkhi et al. 2012): 3,680 (its trainval) and 3,669 photos."""
    folder = _folder(cfg, "annotations")
    file = folder / "annotations" / f"{PETS_SPLITS[split]}.txt"
    with user_errors(f"cannot read {file}", "download the set again", also=DAMAGED):
        rows = [line.split() for line in _lines(file) if not line.startswith("#")]
        labels = [int(row[1]) - 1 for row in rows]
    names = {}
    for (photo, *_), label in zip(rows, labels, strict=True):
        names[label] = photo.rpartition("_")[0].replace("_", " ")
    if sorted(names) != list(range(len(names))):
        raise UserError(f"{file} has classes {sorted(names)}, not 0 to {len(names) - 1}")
    classes = [names[label] for label in range(len(names))]
    files = [f"{row[0]}.jpg" for row in rows]
    return _photos(cfg, split, folder / "images", files, labels, classes)


def flowers102(cfg: ConfigDict, split: str) -> ImageFolder:
    """Read Oxford Flowers-102 (Nilsback & Zisserman 2008): 1,020, 1,020 and 6,149 photos."""
    from scipy.io import loadmat

    folder = _folder(cfg, "setid.mat")
    with user_errors(f"cannot read {folder}", "download the set again", also=MAT_ERRORS):
        read = {
            name: loadmat(io.BytesIO((folder / f"{name}.mat").read_bytes()))
            for name in ("setid", "imagelabels")
        }
        ids = read["setid"][FLOWERS_SPLITS[split]].ravel().tolist()
        labels = read["imagelabels"]["labels"].ravel().astype(int) - 1
        chosen = [int(labels[number - 1]) for number in ids]
    files = [f"image_{number:05}.jpg" for number in ids]
    return _photos(cfg, split, folder / "jpg", files, chosen, FLOWERS)


def _class_folders(names: dict[str, str]) -> Callable[[ConfigDict, str], ImageFolder]:
    """Return the reader of train/WNID and val/WNID, whose classes have these names."""

    def read(cfg: ConfigDict, split: str) -> ImageFolder:
        folder = _folder(cfg, "train")
        listing = image_folder.list_images(folder, split)
        classes = tuple(names.get(wnid, wnid) for wnid in listing.classes)
        return ImageFolder(f"{cfg.name} {listing.root.name}", classes, listing, cfg)

    return read


imagenette, imagewoof = _class_folders(IMAGENETTE), _class_folders(IMAGEWOOF)


def tiny_imagenet(cfg: ConfigDict, split: str) -> ImageFolder:
    """Read Tiny-ImageNet-200: 100,000 photos of 64 x 64, and 10,000 of its validation set."""
    folder = _folder(cfg, "train")
    return image_folder.source(_at(cfg, folder), split)


def _at(cfg: ConfigDict, folder: Path) -> ConfigDict:
    block = cfg.copy_and_resolve_references()
    block.path = str(folder)
    return block
