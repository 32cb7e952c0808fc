"""vLLM's own receivers for GPUs, ``nccl`` and ``ipc``, which also fingerprint what arrives.

Registered as ``r1_nccl`` and ``r1_ipc`` by ``rollout.weight_receiver``; imported when an engine asks for one of them.
"""

from __future__ import annotations

from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

from rollout.fingerprint import Fingerprint, fingerprint_of_loads


class FingerprintedNccl(NCCLWeightTransferEngine):
    """NCCL broadcast from the learner to every engine."""

    digest = ""

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """One version; leaves its fingerprint in ``digest``."""
        found = Fingerprint()
        with fingerprint_of_loads(self.model, found):
            super().receive_weights(update_info)
        self.digest = found.hexdigest()


class FingerprintedIpc(IPCWeightTransferEngine):
    """CUDA IPC: the engines read the learner's tensors on the GPU that they share."""

    digest = ""

    def receive_weights(self, update_info: IPCWeightTransferUpdateInfo) -> None:
        """One version; leaves its fingerprint in ``digest``."""
        found = Fingerprint()
        with fingerprint_of_loads(self.model, found):
            super().receive_weights(update_info)
        self.digest = found.hexdigest()
