"""AutoAugment's tables (Cubuk et al. 2019): a line has (operation, probability, level) twice.

An image gets the two operations of one line.
"""

# AutoAugment's policy for ImageNet: (operation, probability, level) twice a line.
IMAGENET = """
posterize .4 8 rotate .6 9
solarize .6 5 autocontrast .6 5
equalize .8 8 equalize .6 3
posterize .6 7 posterize .6 6
equalize .4 7 solarize .2 4
equalize .4 4 rotate .8 8
solarize .6 3 equalize .6 7
posterize .8 5 equalize 1 2
rotate .2 3 solarize .6 8
equalize .6 8 posterize .4 6
rotate .8 8 colour .4 0
rotate .4 9 equalize .6 2
equalize 0 7 equalize .8 8
invert .6 4 equalize 1 8
colour .6 4 contrast 1 8
rotate .8 8 colour 1 2
colour .8 8 solarize .8 7
sharpness .4 7 invert .6 8
shear_x .6 5 equalize 1 9
colour .4 0 equalize .6 3
equalize .4 7 solarize .2 4
solarize .6 5 autocontrast .6 5
invert .6 4 equalize 1 8
colour .6 4 contrast 1 8
equalize .8 8 equalize .6 3
"""

# The policy that EfficientNet's code has for ImageNet, "v0".
EFFICIENTNET = """
equalize .8 1 shear_y .8 4
colour .4 9 equalize .6 3
colour .4 1 rotate .6 8
solarize .8 3 equalize .4 7
solarize .4 2 solarize .6 2
colour .2 0 equalize .8 8
equalize .4 8 solarize_add .8 3
shear_x .2 9 rotate .6 8
colour .6 1 equalize 1 2
invert .4 9 rotate .6 0
equalize 1 9 shear_y .6 3
colour .4 7 equalize .6 0
posterize .4 6 autocontrast .4 7
solarize .6 8 colour .6 9
solarize .2 4 rotate .8 9
rotate 1 7 translate_y .8 9
shear_x 0 0 solarize .8 4
shear_y .8 0 colour .6 4
colour 1 0 rotate .6 2
equalize .8 4 equalize 0 8
equalize 1 4 autocontrast .6 2
shear_y .4 7 solarize_add .6 7
posterize .8 2 solarize .6 10
solarize .6 8 equalize .6 1
colour .8 6 rotate .4 5
"""

# AutoAugment's policy for CIFAR-10.
CIFAR = """
invert .1 0 contrast .2 6
rotate .7 2 translate_x .3 9
sharpness .8 1 sharpness .9 3
shear_y .5 8 translate_y .7 9
autocontrast .5 0 equalize .9 0
shear_y .2 7 posterize .3 7
colour .4 3 brightness .6 7
sharpness .3 9 brightness .7 9
equalize .6 0 equalize .5 0
contrast .6 7 sharpness .6 5
colour .7 7 translate_x .5 8
equalize .3 0 autocontrast .4 0
translate_y .4 3 sharpness .2 6
brightness .9 6 colour .2 8
solarize .5 2 invert 0 0
equalize .2 0 autocontrast .6 0
equalize .2 0 equalize .6 0
colour .9 9 equalize .6 0
autocontrast .8 0 solarize .2 8
brightness .1 3 colour .7 0
solarize .4 5 autocontrast .9 0
translate_y .9 9 translate_y .7 9
autocontrast .9 0 solarize .8 3
equalize .8 0 invert .1 0
translate_y .7 9 autocontrast .9 0
"""
