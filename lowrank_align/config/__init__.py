"""Every knob, validated, documented under its field. No torch here: `--help` and bad settings answer at once.

The command line's flags are made from these fields (`learning_rate` is `--learning-rate`), a YAML file has the same
names, flags win, and the resolved settings are saved in the run as `config.yaml`.
"""

from lowrank_align.config.commands import (
    COMMANDS,
    AuditSettings,
    ChatSettings,
    DoctorSettings,
    ExportSettings,
    GenerateSettings,
    LogpsSettings,
    PlanSettings,
    PresetsSettings,
    ReadingSettings,
    RowsSettings,
    ScoreSettings,
    ShowSettings,
    StudioSettings,
)
from lowrank_align.config.data import (
    DATA_COMMANDS,
    DataBackupSettings,
    DataConvertSettings,
    DataExportSettings,
    DataImportSettings,
    DataStatsSettings,
)
from lowrank_align.config.evaluation import EvalSettings
from lowrank_align.config.knobs import ModelSettings, Settings
from lowrank_align.config.loops import FrontierSettings, RoundsSettings
from lowrank_align.config.methods import METHODS
from lowrank_align.config.offline import (
    CoHSettings,
    ConditionSettings,
    DPOSettings,
    KTOSettings,
    RewardSettings,
    SFTSettings,
)
from lowrank_align.config.online import (
    ExpertSettings,
    GRPOSettings,
    OnlineDPOSettings,
    OnlineSettings,
    PPOSettings,
    QuarkSettings,
    RLOOSettings,
    is_function,
)
from lowrank_align.config.resolve import resolve, to_yaml
from lowrank_align.config.training import ADAPTERS_OWN, TrainSettings
from lowrank_align.config.yaml_files import parse_yaml, read_yaml

__all__ = [
    "ADAPTERS_OWN",
    "AuditSettings",
    "COMMANDS",
    "ChatSettings",
    "CoHSettings",
    "ConditionSettings",
    "DATA_COMMANDS",
    "DPOSettings",
    "DataBackupSettings",
    "DataConvertSettings",
    "DataExportSettings",
    "DataImportSettings",
    "DataStatsSettings",
    "DoctorSettings",
    "EvalSettings",
    "ExpertSettings",
    "ExportSettings",
    "FrontierSettings",
    "GRPOSettings",
    "GenerateSettings",
    "KTOSettings",
    "LogpsSettings",
    "METHODS",
    "ModelSettings",
    "OnlineDPOSettings",
    "OnlineSettings",
    "PPOSettings",
    "PlanSettings",
    "PresetsSettings",
    "QuarkSettings",
    "RLOOSettings",
    "ReadingSettings",
    "RewardSettings",
    "RoundsSettings",
    "RowsSettings",
    "SFTSettings",
    "ScoreSettings",
    "Settings",
    "ShowSettings",
    "StudioSettings",
    "TrainSettings",
    "is_function",
    "parse_yaml",
    "read_yaml",
    "resolve",
    "to_yaml",
]
