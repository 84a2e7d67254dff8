"""A CMR law as one smooth curve over the ratio, for searches.

At a measured ratio the law `cmr` follows that ratio's own token law, between them the ratio law: a search would be
drawn to the single points. Here it follows the ratio law everywhere.

Array suffixes: D draws, G points.
"""

from __future__ import annotations

import numpy as np

from cpt.laws.cmr import SMALLEST, Cmr
from cpt.laws.recommend.answer import Loss
from cpt.laws.rows import Floats


def ratio_curve(law: Cmr, theta_DP: Floats) -> Loss:
    """loss_DG by the share of the loss's own corpus and tokens.

    Args:
        law, theta_DP: of one loss; row 0 the fit.
    """
    known: dict[float, tuple[Floats, Floats, Floats]] = {}

    def loss(share_G: Floats, tokens_G: Floats) -> Floats:
        ratio_G = np.maximum(share_G if law.side == "domain" else 1 - share_G, SMALLEST)
        tokens_G = np.broadcast_to(tokens_G, share_G.shape)
        loss_DG = np.empty((len(theta_DP), len(share_G)))
        for tokens in np.unique(tokens_G).tolist():
            if tokens not in known:
                known[tokens] = law.ratio_law(theta_DP, tokens)
            alpha_D, s_D, beta_D = known[tokens]
            at = tokens_G == tokens
            loss_DG[:, at] = alpha_D[:, None] * ratio_G[at] ** s_D[:, None] + beta_D[:, None]
        return loss_DG

    return loss
