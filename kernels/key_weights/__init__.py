"""How much of some rows' attention each key gets, computed along with the attention itself."""

from braidsdk.kernels.key_weights.op import KeyWeights, plan_key_weights, weights_by_segment

__all__ = ["KeyWeights", "plan_key_weights", "weights_by_segment"]
