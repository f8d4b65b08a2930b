"""Every field there is, with its default: the one full schema; a config changes what it means to.

A default lives here and nowhere else. Override on the command line with --config.BLOCK.FIELD=VALUE.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,  # decides initialisation, order, augmentation and dropout
            "steps": 1000,  # optimizer steps in the whole run
            "stages": (),  # instead of one run: NAME:ARG in WORKDIR/ARG for each ARG, in this order
            "objective": "classification",  # a name in vit_scale.training.objectives.OBJECTIVES
            "data": data(),
            "augment": augment(),
            "model": model(),
            "distill": distill(),
            "optim": optim(),
            "mesh": mesh(),
            "init": init(),
            "eval": evaluation(),
            "log": log(),
            "checkpoint": checkpoint(),
            "divergence": divergence(),
            "watchdog": watchdog(),
        }
    )


def data() -> dict:
    return {
        "name": "cifar10",  # cifar10 | folder | array_record | fractal
        "path": ".data",  # folder that holds the set; generated sets are cached in it
        "listing": "every",  # files of a folder: every (that Pillow decodes) | common (as before
        # the field: nine extensions, tools' folders inside a class, names cut at a comma)
        "train": "train",  # slice to train on: train, train[:45000], train[:98%]
        "slices": "example",  # what slices go by: example (its path: those of a pack are the same,
        # those of a set that grew nearly) | position (in the list of files: as before the field)
        "changed": False,  # resume although images were added to the set, or removed from it
        "batch": 128,  # images per step, over all devices and hosts (the global batch)
        "resolution": 32,  # height in pixels that the model sees; resized on the device
        "width": placeholder(int),  # width in pixels that the model sees; none: square
        "load": placeholder(int),  # height in pixels at which files are decoded; none: resolution
        "square": False,  # data.load is the width as well, whatever the aspect of data.width: True
        # as before the field
        "exif": True,  # turn images as EXIF says; False: as stored, as timm does
        "memory": False,  # decode a folder or record set once, and keep it in memory
        "workers": 2,  # processes that decode; 0: none, in the training process
        "on_corrupt": "fail",  # fail | skip (masked out, and counted in the metrics)
        "fractal": {  # the generated set, REFERENCES: Anderson & Farrell 2022, OFDB 2023
            "classes": 512,  # how many, counted from `first`
            "first": 0,  # number of the first class: disjoint ranges are disjoint sets
            "train_per_class": 1,  # images per class in `train`; 1 is OFDB
            "test_per_class": 0,  # images per class in `test`
            "resolution": 52,  # rendered height and width in pixels
            "points": 5000,  # points of the chaos game per image
            "jitter": 0.1,  # perturbation of the maps between images of one class, fraction
            "seed": 0,  # decides the classes and their images
        },
    }


def augment() -> dict:
    return {
        "crop": "none",  # none | pad (pad and crop) | resized (random resized crop)
        "pad": 4,  # pixels added on each side before crop=pad, at the stored size
        "scale": (0.08, 1.0),  # area of a resized crop, fraction of the image
        "ratio": (0.75, 4 / 3),  # width / height of a resized crop
        "flip": False,  # mirror left-right with probability 1/2
        "mixup": 0.0,  # Beta(a, a) of mixup (Zhang et al. 2018); 0: off
        "cutmix": 0.0,  # Beta(a, a) of CutMix (Yun et al. 2019); 0: off
        "cutmix_share": 0.5,  # with both on: share of batches that use CutMix
        "smoothing": 0.0,  # label smoothing (Szegedy et al. 2016)
        "mean": (0.5, 0.5, 0.5),  # per channel, of pixels in [0, 1]
        "std": (0.5, 0.5, 0.5),  # per channel, of pixels in [0, 1]
    }


def model() -> dict:
    return {
        "variant": "S/16",  # SIZE/PATCH, STEM+SIZE/PATCH (model.SIZES, convnets.STEMS), or
        # one of convnets.SIZES: cnn, resnet20, ...; the patch is in pixels
        "width": placeholder(int),  # replaces the size's token width; convnets: first channels
        "depth": placeholder(int),  # replaces the size's number of blocks; ResNets: of layers
        "heads": placeholder(int),  # replaces the size's number of attention heads
        "mlp": placeholder(int),  # replaces the size's MLP width; cnn: of its first dense layer
        "classes": 1000,  # outputs of the head
        "pool": "cls",  # cls | gap (mean of the patches' tokens) | map (attention pooling)
        "class_token": False,  # with pool=gap: there is a [CLS] token that the head does not read
        "fc_norm": False,  # with pool=gap: the last norm comes after the mean, not before (MAE)
        "distilled": False,  # a distillation token with a head of its own beside [CLS] (DeiT)
        "posemb": "learned",  # learned | sincos2d
        "dropout": 0.0,  # after position embeddings, attention and both MLP layers
        "drop_path": 0.0,  # stochastic depth (Huang et al. 2016): rises linearly to this rate
        "dtype": "float32",  # of the computation: float32 | bfloat16; parameters stay float32
        "scan": True,  # one compiled block scanned over the depth, or unrolled blocks
        "remat": "none",  # what backward recomputes: none | full | a jax.checkpoint_policies name
        "logits": "float32",  # of attention's scores and softmax: float32 | bfloat16
        "gelu": "exact",  # exact (erf) | tanh (its approximation)
        "norm_epsilon": 1e-6,  # added to the variance in layer norms; 1e-12 in Hugging Face's ViT
        "representation": 0,  # width of a tanh layer before the head (ViT paper, 3.2); 0: none
        "attention": "xla",  # xla (vit_scale/models/attention.py) | cudnn (NVIDIA GPUs, bfloat16)
    }


def distill() -> dict:
    return {  # of objective=distillation
        "teacher": "",  # run folder or RUN/checkpoints/STEP of the model that teaches
        "checksum": "",  # what identifies it; filled in when a run begins
        "kind": "hard",  # hard (its likeliest class) | soft (its probabilities)
        "weight": 0.5,  # of what the teacher says; the labels have the rest
        "temperature": 1.0,  # soft: by which both models' logits are divided
    }


def optim() -> dict:
    return {
        "name": "adamw",  # adamw | sgd | lion | muon
        "lr": 1e-3,  # peak learning rate
        "schedule": "cosine",  # constant | cosine | linear | rsqrt | piecewise
        "warmup": 0,  # steps of linear warm-up from 0
        "end": 0.0,  # cosine, linear: last learning rate, fraction of lr
        "timescale": 10_000,  # rsqrt: steps until lr starts to fall as 1/sqrt (Zhai et al. 2022)
        "cooldown": 0,  # rsqrt: steps of linear fall to 0 at the end
        "milestones": (0.6, 0.85),  # piecewise: fractions of steps at which lr is multiplied
        "factor": 0.1,  # piecewise: by this
        "b1": 0.9,  # adamw, lion, muon: decay of the first moment; sgd: momentum
        "b2": 0.999,  # adamw, lion, and muon for what is no matrix: decay of the second moment
        "moment": "float32",  # in which the first moment is kept: float32 | bfloat16
        "weight_decay": 0.0,  # decoupled, times lr; kernels only (no bias, norm, position, [CLS])
        "clip": 1.0,  # global gradient norm; 0: off
        "accumulate": 1,  # micro-batches per step; the global batch is cut into these
        "ema": 0.0,  # decay of the exponential moving average of the weights; 0: off
        "layer_decay": 1.0,  # lr is multiplied by this per block below the head (BEiT); 1: off
        "train": "all",  # all | head (a linear probe)
        "freeze": (),  # regular expressions on parameter names: those are not trained
    }


def mesh() -> dict:
    return {
        "data": -1,  # devices that split the batch and hold all parameters; -1: the rest
        "fsdp": 1,  # devices that split the batch and the parameters
        "tensor": 1,  # devices that split heads and MLP
        "slices_data": -1,  # slices of a pod that `data` goes over, as well; -1: the rest
        "slices_fsdp": 1,  # slices that `fsdp` goes over, as well
        "slices_tensor": 1,  # slices that `tensor` goes over, as well
        "compiler": (  # options of a TPU's compiler, FLAG=VALUE; other devices ignore them
            # Where data=1: gather parameters whole, not in steps that leave matrix units waiting.
            "xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
        ),
    }


def init() -> dict:
    return {
        "source": "",  # run, RUN/checkpoints/STEP, or others' weights to start from; empty: random
        "tree": "",  # of a file with several models: state_dict, model_ema, teacher; empty: the one
        # that the library of the file takes, which is said
        "image": "",  # HEIGHTxWIDTH in pixels at which a source without a size was trained
        "instead": "",  # config that pretrains such a model, named where source can't be fetched
        "dialect": "",  # of a source that is no run: timm, ...; empty: recognised from its names
        "head": "auto",  # auto (the source's where the classes agree) | keep | new
        "classes": "names",  # outputs go with a set's classes by their names | order (as they are)
        "resample": "cubic",  # positions to a new grid: cubic (timm) | corners (Google's ViT)
    }


def evaluation() -> dict:
    return {
        "split": "test",  # evaluated while training, its best step kept; train[98%:]: test unseen
        "every": 1000,  # steps; 0: only at the end
        "final": "test",  # evaluated at the end, last and best parameters; empty: nothing
        "batch": 256,  # images per evaluation step, over all devices and hosts
        "fit": "shorter",  # of files: shorter (resize the shorter side, cut out the centre: timm) |
        # shortest_edge (the same, rounded as transformers does) | stretch (transformers' ViT) |
        # cover (in one step, as files are decoded for training)
        "crop": 1.0,  # share of the resized side that is seen, the centre of it (timm's crop_pct)
        "resample": "train",  # bilinear | bicubic | lanczos | train (as for training: bicubic of
        # files, then bilinear on the device)
    }


def log() -> dict:
    return {
        "every": 20,  # steps
        "wandb": True,  # Weights & Biases; offline where no key is found
        "project": "vit_scale",  # of Weights & Biases
        "tensorboard": True,  # event files in WORKDIR/tensorboard
        "images": 16,  # augmented training images shown at the first step; 0: none
    }


def checkpoint() -> dict:
    return {
        "every": 1000,  # steps; 0: only at the end
        "keep": 2,  # newest checkpoints kept, beside the best one
        "programs": True,  # compiled programs are kept in the run: going on does not compile again
    }


def divergence() -> dict:
    return {
        "skip": True,  # a step whose loss or gradient is not finite updates nothing
        "patience": 10,  # such steps in a row that are borne; one more: back to a checkpoint
        "rollbacks": 3,  # times that a run goes back, past the batches between; then it exits 43
    }


def watchdog() -> dict:
    return {  # seconds without progress after which the process ends, to be resumed; 0: no limit
        "compile": 7200.0,  # of one compilation
        "step": 1800.0,  # of a training step, a batch to come, a batch of evaluation
        "storage": 7200.0,  # of opening, restoring or saving
        "peer": 90.0,  # of another host that is not heard from; below jax's own 100 s
    }
