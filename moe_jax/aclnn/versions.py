"""Earlier versions of the operators, each the newest one without some parameters: ``VERSIONS`` says which it lacks.

Dispatch and combine belong together by their versions: V2 with V2 or the first combine with RMSNorm, V3 with V3 or the
second, V4 with V4 or the second. On a3, V3 and the second combine with RMSNorm take ``elastic_info``; V4 reserves it.
"""

from moe_jax.aclnn.calls import version
from moe_jax.aclnn.combine import moe_distribute_combine_add_rms_norm_v2, moe_distribute_combine_v4
from moe_jax.aclnn.dispatch import moe_distribute_dispatch_v4
from moe_jax.aclnn.small import distribute_barrier_v2

moe_distribute_dispatch_v2 = version("moe_distribute_dispatch_v2", moe_distribute_dispatch_v4)
moe_distribute_dispatch_v3 = version("moe_distribute_dispatch_v3", moe_distribute_dispatch_v4)
moe_distribute_combine_v2 = version("moe_distribute_combine_v2", moe_distribute_combine_v4)
moe_distribute_combine_v3 = version("moe_distribute_combine_v3", moe_distribute_combine_v4)
moe_distribute_combine_add_rms_norm = version(
    "moe_distribute_combine_add_rms_norm", moe_distribute_combine_add_rms_norm_v2
)
distribute_barrier = version("distribute_barrier", distribute_barrier_v2)
