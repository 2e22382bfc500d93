"""Frozen configuration records by subject: plain data that is sent to every process."""

from longspan.config.cache import KV_DTYPE_NAMES, CacheConfig, OffloadConfig
from longspan.config.checks import parse_bytes, parse_integers, require, require_choice
from longspan.config.cost import CostConstants, Fixed
from longspan.config.engine import (
    DEVICE_NAMES,
    DTYPE_NAMES,
    EXECUTOR_NAMES,
    LOAD_FORMAT_NAMES,
    QUANTIZATION_NAMES,
    ClusterConfig,
    EngineConfig,
    LivenessConfig,
)
from longspan.config.keywords import EngineOptions
from longspan.config.parallel import ParallelConfig
from longspan.config.scheduling import (
    DEFAULT_LOCAL_CONTEXT,
    DEFAULT_RUNNING,
    DEFAULT_STEP_TOKENS,
    SCHEDULING_POLICY_NAMES,
    SchedulerConfig,
)
from longspan.config.speculation import Speculation
from longspan.config.transfer import ROLE_NAMES, TransferConfig

__all__ = [
    "DEFAULT_LOCAL_CONTEXT",
    "DEFAULT_RUNNING",
    "DEFAULT_STEP_TOKENS",
    "DEVICE_NAMES",
    "DTYPE_NAMES",
    "EXECUTOR_NAMES",
    "KV_DTYPE_NAMES",
    "LOAD_FORMAT_NAMES",
    "QUANTIZATION_NAMES",
    "ROLE_NAMES",
    "SCHEDULING_POLICY_NAMES",
    "CacheConfig",
    "ClusterConfig",
    "CostConstants",
    "EngineConfig",
    "EngineOptions",
    "Fixed",
    "LivenessConfig",
    "OffloadConfig",
    "ParallelConfig",
    "SchedulerConfig",
    "Speculation",
    "TransferConfig",
    "parse_bytes",
    "parse_integers",
    "require",
    "require_choice",
]
