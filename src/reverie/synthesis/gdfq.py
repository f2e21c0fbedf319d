"""GDFQ: a generator of images that the teacher takes for the class asked for, with its batch-norm statistics.

    loss = class_weight * CE(T(x), y) + statistics_weight * BNS(x)          x = G(z, y), z ~ N(0, I), y uniform
    BNS(x) = (1/L) sum_l [ MSE(m_l(x), mu_l) + MSE(v_l(x), var_l) ]         batch level, variances (algorithms 1.4)

With `relative`, the default, BNS is `zeroq`'s distance instead: means and deviations in units of the running deviation.

The baseline of the whole family. Reference: Xu et al. 2020, arXiv:2003.03603, equations 3 to 5; constants of the released
code (algorithms 1.6): weights 1 and 0.1 (of the absolute BNS); batch 16 and 10,000 steps of warm-up for ImageNet, 200 and 800 for CIFAR-100;
width 128. The student's side (KL at temperature 20, cross-entropy) is `recovery/distillation.py`.
"""

from dataclasses import dataclass

from reverie.synthesis._stream import GeneratorMethod


@dataclass(frozen=True, kw_only=True)
class Gdfq(GeneratorMethod):
    """A class-conditional generator trained by what its whole family has in common: cross-entropy and batch-norm statistics."""


METHOD = Gdfq
