"""Is a dataset fit for training?"""

from rlkit2.data.audit.checks import audit as audit
from rlkit2.data.audit.findings import AuditReport as AuditReport
