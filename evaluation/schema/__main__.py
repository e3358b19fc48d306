"""Print the JSON Schema of a report."""

import json

from paredown.evaluation.schema.check import report_json_schema

print(json.dumps(report_json_schema(), indent=2))
