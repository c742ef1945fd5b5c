"""Whether rows will train what they are meant to train: findings, figures and a verdict, before the GPU is touched."""

from lowrank_align.data.audit.before_training import check_rows
from lowrank_align.data.audit.findings import Finding
from lowrank_align.data.audit.printing import print_audit
from lowrank_align.data.audit.reading import ReadRows, read_rows
from lowrank_align.data.audit.report import Audit, Verdict, audit_rows
from lowrank_align.data.audit.special import special_tokens
from lowrank_align.data.audit.tokens import UNCUT

__all__ = [
    "UNCUT",
    "Audit",
    "Finding",
    "ReadRows",
    "Verdict",
    "audit_rows",
    "check_rows",
    "print_audit",
    "read_rows",
    "special_tokens",
]
