from tests.harness.own_code import own_folder as own_folder
from tests.harness.ranks import ranks as ranks
from tests.harness.s3 import _s3_environment as _s3_environment
from tests.harness.s3 import s3 as s3
from tests.harness.s3 import s3_server as s3_server
