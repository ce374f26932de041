from polyradix_tpu.aot.chips import prepare

prepare()
