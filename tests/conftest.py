from tests.harness.own_code import own_folder as own_folder
from tests.harness.ranks import ranks as ranks
