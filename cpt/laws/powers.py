"""Sums of positive terms exp(linear in the parameters): their values, gradients and non-negative least-squares seeds.

Array suffixes: B parameter vectors, P parameters, R rows, S starts, T terms.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from cpt.laws.rows import Floats

SMALLEST = 1e-6  # a coefficient that least squares puts at 0 starts here, as a share of the mean loss


def seeds(term_STR: Floats, loss_R: Floats, weight_R: Floats) -> tuple[Floats, Floats]:
    """Non-negative coefficients of the terms that best sum to the losses, relative errors counting.

    Args:
        term_STR: the terms without their coefficients, at each start's exponents.

    Returns:
        log of the coefficients_ST, kept above a small share of the mean loss; misfit_S.
    """
    by_R = np.sqrt(weight_R) / loss_R
    target_R = loss_R * by_R
    coefficient_ST = np.empty(term_STR.shape[:2])
    misfit_S = np.empty(len(term_STR))
    for s, term_TR in enumerate(term_STR):
        columns_RT = (term_TR * by_R).T
        length_T = np.sqrt(np.sum(columns_RT**2, axis=0)) + 1e-300
        found_T, misfit_S[s] = nnls(columns_RT / length_T, target_R)
        coefficient_ST[s] = found_T / length_T
    mean_ST = np.maximum(term_STR.mean(axis=2), 1e-300)
    least_ST = SMALLEST * float(loss_R.mean()) / mean_ST
    return np.log(np.maximum(coefficient_ST, least_ST)), misfit_S
