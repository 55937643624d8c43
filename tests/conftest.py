from tests.harness.ranks import ranks as ranks
