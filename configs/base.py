"""The schema: every config field, with its default.

A config starts from these defaults and sets what differs. Override a field on the command line with
--config.BLOCK.FIELD=VALUE.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,  # seed of initialisation, data order, augmentation, and dropout
            "steps": 1000,  # optimizer steps in the whole run
            "stages": (),  # train NAME:ARG in WORKDIR/ARG for each ARG in turn, instead of one run
            "objective": "classification",  # a name in vit_scale.training.objectives.OBJECTIVES
            "loss": "softmax",  # of the labels: softmax | sigmoid (binary cross-entropy, a sum over
            # classes: big_vision) | binary (its mean; a mixed image has both classes: DeiT III) |
            # focal (Lin et al. 2017, a sum over classes); of numbers: mse | mae | huber
            "focal": focal(),
            "class_weights": class_weights(),
            "regression": regression(),
            "data": data(),
            "augment": augment(),
            "model": model(),
            "lora": lora(),
            "distill": distill(),
            "views": views(),
            "mae": mae(),
            "dino": dino(),
            "lejepa": lejepa(),
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


def focal() -> dict:
    return {  # of loss=focal (Lin et al. 2017, arXiv 1708.02002)
        "gamma": 2.0,  # exponent of the error, by which well classified examples count less
        "alpha": placeholder(float),  # weight of a present class, 1 - alpha of an absent; None: 1
    }


def class_weights() -> dict:
    return {  # weights of the classes in the loss, from their counts in the training set
        "kind": "none",  # none | balanced (inverse of the count) | effective (Cui et al. 2019)
        "beta": 0.999,  # effective: counts saturate at 1 / (1 - beta)
        "weights": (),  # one for each class; filled in when a run begins
    }


def regression() -> dict:
    return {  # of objective=regression
        "mean": (),  # of each number in the training set; filled in when a run begins
        "std": (),  # the model learns (number - mean) / std; filled in when a run begins
        "delta": 1.0,  # loss=huber: error, in units of std, from which the loss is linear
    }


def data() -> dict:
    return {
        "name": "cifar10",  # folder | array_record | tar | huggingface | tfds | fractal, or a set
        # that `vit-scale data download` knows: cifar10 | cifar100 | mnist | fashion_mnist | svhn |
        # stl10 | flowers102 | pets | food101 | imagenette | imagewoof | tiny_imagenet
        "path": ".data",  # folder of the data set; generated sets are cached there
        "image_column": "",  # huggingface, tfds: column of the images; empty: the only one
        "label_column": "",  # huggingface, tfds: column of the labels; empty: the only one
        "target": "class",  # of an image: class | classes (several: multi-hot) | value (numbers),
        # these two of tar, huggingface, array_record, and folder (SPLIT.csv or SPLIT.json) | none
        # (no labels: every image file of a folder; for objectives that need none)
        "listing": "every",  # image files of a folder: every (that Pillow decodes) | common (nine
        # extensions, hidden folders inside a class too, class names up to a comma: older runs)
        "train": "train",  # split to train on: train, train[:45000], train[:98%]
        "mixture": (),  # sets to train on together instead, each with a weight:
        # (("folder:DIR", 0.7), ("tar:DIR", 0.3)); evaluation reads data.name at data.path
        "sampling": "shuffle",  # shuffle | balanced (each class equally often)
        "slices": "example",  # how split slices are chosen: example (by path: the same for a packed
        # set, almost the same for one that grew) | position (in the list of files: older runs)
        "changed": False,  # resume although images were added or removed
        "repeats": 1,  # times that a batch has each image, augmented anew (Hoffer et al. 2020)
        "batch": 128,  # global batch: images per step over all devices and hosts
        "resolution": 32,  # image height in pixels at the model's input
        "width": placeholder(int),  # image width in pixels at the model's input; None: square
        "load": placeholder(int),  # height in pixels to decode files to; None or 0: resolution
        "square": False,  # decode to a square of data.load even if data.width is set (older runs)
        "exif": True,  # apply the EXIF orientation; timm does not (False)
        "memory": False,  # decode the whole set once and keep it in memory
        "workers": 2,  # decoding processes; 0: decode in the training process
        "threads": 1,  # decoding threads in each of these processes
        "cache": 50.0,  # GiB of this machine's disk, shared by its processes, for what is read of
        # ArrayRecord and tar shards in a bucket; 0: none, a request for each image of each epoch
        "decoder": "turbo",  # of augment.crop=torchvision and inception: turbo (libjpeg-turbo and
        # SIMD, two to three times as fast) | pillow
        "on_corrupt": "fail",  # fail | skip (mask the image and count it in the metrics)
        "fractal": {  # the generated set (Anderson & Farrell 2022; OFDB, Nakamura et al. 2023)
            "classes": 512,  # number of classes
            "first": 0,  # index of the first class; disjoint ranges give disjoint sets
            "train_per_class": 1,  # images per class in `train`; 1 is OFDB
            "test_per_class": 0,  # images per class in `test`
            "resolution": 52,  # rendered height and width in pixels
            "points": 5000,  # points of the chaos game per image
            "jitter": 0.1,  # perturbation of the maps within a class, as a fraction
            "seed": 0,  # seed of the classes and their images
        },
    }


def augment() -> dict:
    return {
        "crop": "none",  # none | pad (pad and crop) | resized (random resized crop, in the step);
        # of image files before they are decoded: torchvision (timm, DeiT) | inception (big_vision)
        "pad": 4,  # pixels added on each side before crop=pad, at the stored size
        "scale": (0.08, 1.0),  # area of a resized crop, as a fraction of the image
        "ratio": (0.75, 4 / 3),  # width / height of a resized crop; TensorFlow's is (0.75, 1.33)
        "resample": "bicubic",  # torchvision, inception: bilinear | bicubic | lanczos | random (one
        # of the first two for each image)
        "flip": False,  # mirror left-right with probability 1/2
        "policy": "",  # timm's rand-m9-mstd0.5-inc1, original, v0, 3a, ... | big_vision's
        # randaug(2,10) | torchvision's trivialaugment, autoaugment-imagenet, autoaugment-cifar10
        "jitter": (0.0, 0.0, 0.0, 0.0),  # strength of brightness, contrast, saturation, hue
        "jitter_chance": 1.0,  # probability of jitter
        "grey": 0.0,  # probability of an image in grey
        "blur": 0.0,  # probability of a Gaussian blur of 0.1 to 2 pixels
        "solarize": 0.0,  # probability of inverting the levels from 128
        "mixup": 0.0,  # Beta(a, a) of mixup (Zhang et al. 2018); 0: off
        "cutmix": 0.0,  # Beta(a, a) of CutMix (Yun et al. 2019); 0: off
        "cutmix_share": 0.5,  # with both on: share of batches that use CutMix
        "mix": "batch",  # mixup and CutMix drawn once per batch | pair | example
        "erase": 0.0,  # probability of random erasing (Zhong et al. 2020); 0: off
        "erase_area": (0.02, 1 / 3),  # erased area, as a fraction of the image
        "erase_mode": "pixel",  # fill with 0 (const) | a random colour (rand) | noise (pixel)
        "until": 1.0,  # changes of colour, mixing and erasing end after this fraction of steps
        "smoothing": 0.0,  # label smoothing (Szegedy et al. 2016)
        "mean": (0.5, 0.5, 0.5),  # per channel, of pixels in [0, 1]
        "std": (0.5, 0.5, 0.5),  # per channel, of pixels in [0, 1]
    }


def model() -> dict:
    return {
        "variant": "S/16",  # SIZE/PATCH (patch in pixels), STEM+SIZE/PATCH, or a convnet:
        # cnn, resnet20, ...; sizes in models/spec.py, stems in stems.py, convnets in convnets.py;
        # source: the whole architecture of init.source, and its pixels' mean and std
        "width": placeholder(int),  # token width, instead of the size's; convnets: first channels
        "depth": placeholder(int),  # number of blocks, instead of the size's; ResNets: layers
        "heads": placeholder(int),  # attention heads, instead of the size's
        "mlp": placeholder(int),  # MLP width, instead of the size's; cnn: first dense layer
        "classes": 1000,  # outputs of the head; 0: no head (self-supervised objectives)
        "registers": 0,  # register tokens, behind [CLS] (Darcet et al. 2024)
        "swiglu": placeholder(bool),  # gated MLP (Shazeer 2020); None: as the size has it
        "norm": "layernorm",  # layernorm | rmsnorm (Zhang & Sennrich 2019)
        "pre_norm": False,  # a norm before the first block (CLIP)
        "final_norm": True,  # a norm after the last block
        "attention_norm": False,  # a norm of what attention reads, before its output layer (EVA-02)
        "mlp_norm": False,  # a norm inside the MLP, before its second layer (EVA-02)
        "qk_norm": "none",  # of queries and keys, per head: none | layernorm | rmsnorm
        "qkv_bias": True,  # bias of queries, keys and values
        "proj_bias": True,  # bias of attention's output and of the MLP
        "patch_bias": True,  # bias of the patch embedding
        "pool": "cls",  # cls | gap (mean of the patch tokens) | map (attention pooling) | cls_gap
        # ([CLS] and the mean, concatenated: DINOv2's linear head)
        "pool_heads": placeholder(int),  # heads of attention pooling, instead of the model's
        "pool_mlp": placeholder(int),  # MLP width of attention pooling, instead of the model's
        "class_token": False,  # with pool=gap, map: add a [CLS] token; gap does not read it
        "fc_norm": False,  # with pool=gap: final norm after the mean instead of before (MAE)
        "distilled": False,  # add a distillation token with its own head (DeiT)
        "posemb": "learned",  # learned | sincos2d | none
        "rope": "none",  # rotary positions: none | axial | dinov3 | mixed (models/rotary.py)
        "rope_temperature": 100.0,  # of the frequencies: 100 in DINOv3 and RoPE-ViT, but 10 in
        # its mixed kind; 1e4 in EVA-02
        "rope_reference": 0,  # axial, mixed: patches per side to stretch coordinates to; 0: off
        "rope_offset": 0.0,  # axial, mixed: coordinate of the first patch
        "rope_shift": 0.0,  # in training, a shift of the coordinates up to this; 0: off
        "rope_jitter": 0.0,  # in training, a factor of each axis from 1/this to this; 0: off
        "rope_rescale": 0.0,  # in training, a factor of both axes from 1/this to this; 0: off
        "nearest_grid": False,  # resize images that the patch does not divide to the nearest grid
        "dropout": 0.0,  # after position embeddings, attention and both MLP layers
        "patch_drop": 0.0,  # fraction of each image's patches that training leaves out
        "drop_path": 0.0,  # stochastic depth (Huang et al. 2016): rises linearly to this rate
        "drop_path_uniform": False,  # stochastic depth at the same rate in all blocks (DeiT III)
        "layer_scale": 0.0,  # initial value of LayerScale (Touvron et al. 2021); 0: none
        "head_bias": 0.0,  # initial bias of the head: -log(classes) for a loss per class
        "dtype": "float32",  # of the computation: float32 | bfloat16; parameters are float32
        "scan": True,  # scan one compiled block over the depth; False: unroll the blocks
        "remat": "none",  # rematerialisation: none | full | a jax.checkpoint_policies name
        "logits": "float32",  # dtype of the attention logits and softmax: float32 | bfloat16
        "gelu": "exact",  # exact (erf) | tanh (approximation) | quick (OpenAI's CLIP)
        "norm_epsilon": 1e-6,  # epsilon of the layer norms; 1e-12 in Hugging Face's ViT
        "stem_epsilon": "google",  # of a BiT ResNet: google | timm (models/bit.py)
        "representation": 0,  # width of a tanh layer before the head (ViT paper, 3.2); 0: none
        "attention": "xla",  # xla (vit_scale/models/attention.py) | cudnn (NVIDIA GPUs, bfloat16)
    }


def lora() -> dict:
    return {  # adapters, trained with the head instead of the rest (LoRA, Hu et al. 2022)
        "rank": 0,  # of the adapters; 0: none
        "alpha": 16.0,  # an adapter's product is multiplied by alpha / rank
        "kernels": "attention/(query|value)/kernel$",  # regular expression of the names of kernels
        # to adapt, of attention and MLP: kernel$ is all of them
    }


def distill() -> dict:
    return {  # of objective=distillation
        "teacher": "",  # the teacher: run folder, or RUN/checkpoints/STEP
        "checksum": "",  # of the teacher's checkpoint; filled in when a run begins
        "kind": "hard",  # hard (the teacher's most likely class) | soft (its probabilities)
        "weight": 0.5,  # weight of the teacher's loss; the labels' loss has the rest
        "temperature": 1.0,  # soft: divisor of both models' logits
    }


def views() -> dict:
    return {  # crops of an image, of objective=dino and lejepa; augment.scale is of global crops
        "globals": 2,  # crops at data.resolution
        "locals": 0,  # small crops, which only the student sees
        "local_resolution": 96,  # height and width of small crops in pixels
        "local_scale": (0.05, 0.25),  # area of a small crop, as a fraction of the image
        # Probabilities of the first global crop, the others, and small ones; instead of augment's.
        "blur": (1.0, 0.1, 0.5),  # DINO's
        "solarize": (0.0, 0.2, 0.0),  # DINO's
    }


def mae() -> dict:
    return {  # of objective=mae (He et al. 2022)
        "mask": 0.75,  # fraction of the patches that are hidden
        "width": 512,  # token width of the decoder
        "depth": 8,  # blocks of the decoder
        "heads": 16,  # attention heads of the decoder
        "mlp": placeholder(int),  # MLP width of the decoder; None: four times its width
        "normalise": True,  # predict pixels normalised by the mean and variance of their patch
    }


def dino() -> dict:
    return {  # of objective=dino: self-distillation (Caron et al. 2021), and iBOT's and DINOv2's
        "prototypes": 65_536,  # outputs of the head
        "hidden": 2048,  # width of the head's hidden layers
        "bottleneck": 256,  # width of the vector before the prototypes
        "layers": 3,  # layers of the head, up to that vector
        "student_temperature": 0.1,  # divisor of the student's logits
        "teacher_temperature": 0.04,  # divisor of the teacher's logits, after its warm-up
        "teacher_temperature_start": 0.04,  # and at step 0
        "teacher_warmup": 0,  # steps of the linear change between the two
        "momentum": 0.996,  # decay of the average that is the teacher, at step 0
        "momentum_end": 1.0,  # and at the last step, on a cosine
        "centring": "mean",  # of the teacher's logits: mean (a running one) | sinkhorn (DINOv2)
        "centre_momentum": 0.9,  # decay of the running mean
        "freeze_prototypes": 0,  # steps at the start in which the prototypes stay as they are
        "ibot": 0.0,  # weight of the loss of hidden patches (Zhou et al. 2022); 0: off
        "ibot_head": "shared",  # of patches: shared (that of images: iBOT) | own (DINOv2)
        "mask": (0.1, 0.5),  # range of the fraction of patches that are hidden
        "mask_share": 0.5,  # fraction of the global crops that have hidden patches
        "koleo": 0.0,  # weight of KoLeo (Sablayrolles et al. 2019), 0.1 in DINOv2; 0: off
    }


def lejepa() -> dict:
    return {  # of objective=lejepa (Balestriero & LeCun 2025)
        "weight": 0.05,  # weight of normality (SIGReg); agreement has the rest
        "slices": 1024,  # random directions in which normality is tested, new ones at each step
        "hidden": 2048,  # width of the projector's hidden layers
        "width": 128,  # width of its output
        "layers": 3,  # its layers
    }


def optim() -> dict:
    return {
        "name": "adamw",  # adamw | sgd | lion | muon | lamb
        "lr": 1e-3,  # peak learning rate
        "schedule": "cosine",  # constant | cosine | linear | rsqrt | piecewise
        "warmup": 0,  # steps of linear warm-up from 0
        "end": 0.0,  # cosine, linear: final learning rate, as a fraction of lr
        "timescale": 10_000,  # rsqrt: steps until lr starts to fall as 1/sqrt (Zhai et al. 2022)
        "cooldown": 0,  # steps at the end in which any schedule falls to 0; with constant: WSD
        "cooldown_shape": "linear",  # of that fall: linear | sqrt (1 - sqrt: Hägele et al. 2024)
        "milestones": (0.6, 0.85),  # piecewise: fractions of steps at which lr is multiplied
        "factor": 0.1,  # piecewise: the multiplier
        "b1": 0.9,  # adamw, lamb, lion, muon: decay of the first moment; sgd: momentum
        "b2": 0.999,  # adamw, lamb, lion, muon's Adam: decay of the second moment
        "muon_convolutions": False,  # muon: also for the convolutions of stems and convnets; False:
        # Adam trains them, as the dense layers of cnn, whose orthogonalisation would cost too much
        "moment": "float32",  # dtype of the first moment: float32 | bfloat16
        "weight_decay": 0.0,  # decoupled, times lr; kernels only (no bias, norm, position, [CLS])
        "weight_decay_end": placeholder(float),  # weight decay of the last step, on a cosine
        # from that of the first (DINO); None: it stays the same
        "clip": 1.0,  # maximum global gradient norm; 0: off
        "accumulate": 1,  # micro-batches that the global batch is split into
        "ema": 0.0,  # decay of the exponential moving average of the weights; 0: off
        "layer_decay": 1.0,  # lr is multiplied by this per block below the head (BEiT); 1: off
        "train": "all",  # all | head (a linear probe) | a regular expression of parameter names:
        # bias$|^head (BitFit, Zaken et al. 2022)
        "freeze": (),  # regular expressions of parameter names not to train
    }


def mesh() -> dict:
    return {
        "data": -1,  # data-parallel devices; -1: all that remain
        "fsdp": 1,  # fully-sharded data-parallel devices
        "tensor": 1,  # tensor-parallel devices: split attention heads and MLP
        "slices_data": -1,  # slices (DCN) that `data` spans too; -1: all that remain
        "slices_fsdp": 1,  # slices that `fsdp` spans too
        "slices_tensor": 1,  # slices that `tensor` spans too
        "compiler": (  # TPU compiler options, FLAG=VALUE; other devices ignore them
            # With data=1: gather parameters at once; windowed gathers leave matrix units idle.
            "xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
        ),
    }


def init() -> dict:
    return {
        "source": "",  # initial weights: a run, RUN/checkpoints/STEP, a file, or hf://ORG/NAME on
        # the Hugging Face Hub; empty: random
        "tree": "",  # which of several models in a file: state_dict, model_ema, teacher; empty:
        # the one that the file's own library loads; it is printed
        "image": "",  # HEIGHTxWIDTH in pixels of the source's training, if not in its files
        "instead": "",  # config that pretrains a replacement, named if the download fails
        "dialect": "",  # format of foreign weights: timm, ...; empty: recognised by names
        "architecture": "",  # timm's name of it, such as eva02_base_patch14_224, for a file whose
        # arrays and config.json don't tell what they compute
        "head": "auto",  # auto (keep the source's head if the classes agree) | keep | new
        "classes": "names",  # match outputs to classes by names | order
        "resample": "cubic",  # position embeddings: cubic (timm) | corners (Google's ViT) | bicubic
        # (transformers' Dinov2, CLIP and SigLIP)
    }


def evaluation() -> dict:
    return {
        "split": "test",  # evaluated in training to select the best step; train[98%:] spares test
        "every": 1000,  # steps; 0: only at the end
        "final": "test",  # evaluated at the end, last and best step; empty: none
        "batch": 256,  # global batch of evaluation
        "probe": "",  # measure features instead of the head's predictions: knn (of 20 neighbours);
        # for objectives without labels
        "bank": "",  # split with the neighbours of eval.probe=knn; empty: data.train
        "fit": "shorter",  # of files: shorter (resize the shorter side, crop the centre: timm) |
        # shortest_edge (the same, rounded like transformers) | stretch (transformers' ViT) |
        # cover (in one step, as files are decoded for training)
        "crop": 1.0,  # fraction of the resized side to keep (timm's crop_pct)
        "flip": False,  # average the outputs of an image and its mirror image, in prediction too
        "resample": "train",  # bilinear | bicubic | lanczos | train (as in training: bicubic for
        # files, then bilinear on the device)
    }


def log() -> dict:
    return {
        "every": 20,  # steps
        "wandb": True,  # log to Weights & Biases; offline without an API key
        "project": "vit_scale",  # project in Weights & Biases
        "tensorboard": True,  # write event files to WORKDIR/tensorboard
        "images": 16,  # augmented training images logged at the first step; 0: none
        "profile": (0, 0),  # trace of training for xprof: its first step, counted from 1, and how
        # many steps; 0 steps: none. The first step compiles. SIGUSR2 traces the next ten
    }


def checkpoint() -> dict:
    return {
        "every": 1000,  # steps; 0: only at the end
        "frozen": "auto",  # frozen parameters are in each checkpoint (each) | once in WORKDIR/base,
        # so that checkpoints are as small as what is trained (once) | auto: once with lora.rank
        "keep": 2,  # newest checkpoints to keep, besides the best one
        "programs": True,  # cache compiled programs in the run: resuming doesn't compile again
    }


def divergence() -> dict:
    return {
        "skip": True,  # skip the update of a step whose loss or gradient is not finite
        "patience": 10,  # tolerated in a row; one more rolls back to the last checkpoint
        "rollbacks": 3,  # rollbacks per run, each skipping the batches between; then exit 43
    }


def watchdog() -> dict:
    return {  # seconds without progress before the process exits, resumable; 0: no limit
        "compile": 7200.0,  # one compilation
        "step": 1800.0,  # a train step, loading a batch, an evaluation batch
        "storage": 7200.0,  # opening, restoring, or saving
        "peer": 90.0,  # another host's heartbeat; keep it below jax's own 100 s
    }
