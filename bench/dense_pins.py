"""Files of the packages behind the dense (per-pixel) material, as ``sha256sum`` prints them."""

from __future__ import annotations


def files(name: str) -> dict[str, str]:
    """Path inside the package -> sha256, of the asset of that name (`bench.pins.ASSETS`)."""
    folder, sums = _SUMS[name]
    pairs = (line.split() for line in sums.split("\n") if line)
    return {f"{folder}/{path}": sha256 for sha256, path in pairs}


_SUMS = {
    "opencv-photos": (  # BSD-3-Clause or Apache-2.0: OpenCV's samples in colour
        "usr/share/doc/opencv-doc/examples",
        """
9928b44eee0d1d7ab2ffd9d6d80bbbff962d6e85c7786de2cd3c97fe72229186 alphamat/input_images/plant.jpg
d9a69191f6e3642ea361bc3c62e677b2f40fe6534b78da540f4155e0734b59ef data/aero1.jpg
cce5736808efe80d9f04b118dbb978c344d4345672b332718c3e039a3eeb8eee data/aloeL.jpg
e86879de3d9a807dedc742a8f464f39e6b74bbb531a1fba3583155d94997d1cd data/apple.jpg
1a1dd18d78eec44420af3b0b7f08ee3d41c982916cae3ce203d7ff35d754cc0f data/baboon.jpg
4c9a24ba67138ad5486d550f586cc5dd1161be112f1c1bea336d6c550cdf255f data/board.jpg
742a1baad62ac82e91e718e77eedf7e85c2eddc4badfb8c87c6cbc86c45a8b07 data/building.jpg
34a99716b78ded10eae87b4880de739d3e68cc7dd1a96812bb28f469d5eeaea8 data/butterfly.jpg
4d2cf040de084fd3f34d5e3f96f1251faaa4787c1ac3b548fec5809a0d01854e data/chicky_512.png
9c031d80a1c52da5eca790db896baffec6a7e52bf786cdb7bbfca5c7f880e6a1 data/fruits.jpg
1504b769303c7bde00fa578eeaad3c68e02aceabeb1242e556f1f8d19e4bdea5 data/graf1.png
23b8cf46a1965d0ec33459b875aed43187802834db49e0daa9fa2cc842e9d8d2 data/home.jpg
b2977cdbd9fb3f94dadd6f76cf586d145676deb8a22b5f0f42149d21c058c09f data/leuvenA.jpg
1d570e49654e84c7a943918537bd9e5e1ef82920152e147c834006e235be97c9 data/messi5.jpg
152c20d2f380ac985de25e474e1a5f06ed34b932191342099b8272a63a15a079 data/orange.jpg
eb312435369dac9efcc92f7e098edbd9ed8d7e6dfede8b3b4d8e3702cd80b796 data/rubberwhale1.png
20bb6e8ae96918a36c9886b6d48e54eedeb3948591e1485c206bc1dc60c8dc8b data/squirrel_cls.jpg
21cd00afbdd0727f445dd91c0a09633e6345ed5b05a3d2355453a1f3c314c6c5 data/stuff.jpg
1c50e61afddd60ebb3829d85187f4e46c9eb8fd8249237ddf0c8904a3286598d dnn_superres/butterfly.png
e4fec7e2e67a8a425b512dc32452825655b11c7fa83326ae509c5c7ab138da9a hfs/data/000.jpg
4bcbe0927a8b50f2487463894328da66cddf37f2daa88448258b72892d1f7a23 hfs/data/001.jpg
21b07a5287dec0306846191abf720c352e57b2c6b42bb30885c9deb02664ada7 hfs/data/002.jpg
205d424fb53bc9a2d62d03e16a33f70d8609d4602e06194cf6218a3666226512 reg/home.png
7f3041a7019ab4d33d2452bc757d8c4f38616bfde71431e12f7ec370d7b2018e text/scenetext01.jpg
d4295bff9f348012f91a2cf745753124f85041fe3c3717146c6759c4cd977211 text/scenetext02.jpg
cadf4a3d29a7ba6fe976b53fa65f490cc2868375e8feb3d93f26029f05c662ca text/scenetext03.jpg
28e08d142a04f92f96d01ff2674f7804321841cba95bd968980cdc85ef0af6df text/scenetext04.jpg
63985ac1a9989a8320605d5be0ec285af0c6304a78cc9cc5de6c2c7c435f7c0b text/scenetext05.jpg
e4d64f10bbfb27b2c5980cb048fd0abe20dd74868ba5460298de473ced53b518 text/scenetext06.jpg
""",
    ),
    "skimage-photos": (  # public domain and CC0: scikit-image's own photos
        "skimage/data",
        """
88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5 astronaut.png
596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb chelsea.png
cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7 coffee.png
db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179 motorcycle_left.png
c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c rocket.jpg
""",
    ),
    "sklearn-photos": (  # CC BY 2.0: scikit-learn's own photos
        "sklearn/datasets/images",
        """
8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29 china.jpg
a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638 flower.jpg
""",
    ),
    "interior-photos": (  # Pexels licence (free; the package MIT): rooms and still lifes
        "interior_photos/images",
        """
b6e16e5ee478e440371cbb84663001f5eb002017b3297fa3a6beaf34bf574a20 pexels-1317558.jpg
dbea1bddc6c5f72649e234b4d5cbdb51f5a64ef0c6ffe5fbd35a5e880d98b3a2 pexels-2416933.jpg
ff78652765e82259d6353a373e18e889ccb0f3866aefbc56c70777da01143f74 pexels-2560067.jpg
560e7fb6af81a71312e08e076799b3d5361d13b13b7dff9218b22e9e2a431558 pexels-3062948.jpg
e476c06b560c523340c226be3947f7d9fdd815202966e9c542a7b3acf873164c pexels-36030587.jpg
a754e7ded0243a007d318afa21c4b5618b0043b7a78e8823bb13a294a2a5b6ab pexels-36179987.jpg
2ac1c9677e03b3d06055bedefe9c7627edcd4685e8553247948a99917bd20900 pexels-36236147.jpg
b9828837bcdce3a4c1ccf6f7fabe4f30818dfbb6ce53fd9e270088c821bc9db7 pexels-36358763.jpg
9c73de16f3cba8a3c86df21f89cbe35fe98c280e18008ac4e11a4c5c763f3814 pexels-3965508.jpg
772c840c3748e2d4a4e9a5a4f4bfe5a57d4faf2b0425a1403effdd8232707e96 pexels-4389955.jpg
2c8ae7a123905dcd9adb75a086c34d603d52f5c5ade2e2a303c0a788cf2a5551 pexels-4400637.jpg
e01122cede8b1a254e303289683cacc9fba8cdcb83a95fae25d58e0777bfcef2 pexels-4543103.jpg
058423fa2a9e14284891c6182fa27eb9ce9351c567dea8886ee1123c5fb02a8a pexels-5386834.jpg
8235daf8fc018e231f14d3fcd20bb66286f9ab7bdd9943d36375ec2366f0e9e0 pexels-5604956.jpg
67d3cc017a35e08ffd88fcd5a23b21abd880a5a66feb8356bbbeeb9bc1ad1775 pexels-5853819.jpg
d28498f127939cc91b0dbadf65cc1b713781942cbe9c447d139437535b971318 pexels-6373478.jpg
2be08ebd653afcc6017c0f5ac73f8583a11c55e55ef0d57b479c8a62cec320bd pexels-6615808.jpg
9396da5148ca7e2699607d9398a07657855ffb042d6fe739256f1009b0d3d092 pexels-6707631.jpg
b10a2fc0c201d1c91b034c37a79875cb87f345626241f6766af0dd62c980c7b7 pexels-6830376.jpg
f84559fe4f13496eef8a5bd40a9abbe797aa24c524967ed6820a7d43717901bd pexels-6956495.jpg
5676e4aa3776e4955c684a287fd96296dd048409558d36ba1aee9a40a3a983c7 pexels-6963783.jpg
d1c79b443b23f49e8e30f9e7d2e8b03cc16a04879214d3e333d909ee20a2c31c pexels-6963788.jpg
387ad7436fd2a23edda98992dc0a25f8d191d3aedcef58e4ccd2a3e39560d19d pexels-7193656.jpg
afc56689e51c5248b1c81ade7a6e775c4fcf6fc84b6ae98045ce60cf56f510d3 pexels-7247504.jpg
47657161423b5ff08dd112feaac3bf7c2f96347b8dcb3ec2eb3fea7487b5f24f pexels-7303773.jpg
fa2bed103031c8530a8fc5bfb08d12fd9bdc1e4251d59efa3e306c801bad8207 pexels-7303782.jpg
8ccf4fe0aa2dcd52b7e2998f455cea8e147a228ee43f8e7cf27d187f2e287c8e pexels-7303800.jpg
e186db6df715973e8853ed9dfc306610ff598bb1642e3a75847d4f433cd9f5ac pexels-7303842.jpg
96846cbd7c00e256fea84a8624180db5b8f72cc21f03de71bc616349a039c55b pexels-7303992.jpg
611d831e1dc6a91c2498493f7ffdc5f9a1c7bfa31c735acf5002c3ad8525dfb1 pexels-7688357.jpg
e0bb0bf3c6c007bd683bfaccebe36c232fdf7dada936ee232ca6fe61b41ab344 pexels-cup-of-couple-6962851.jpg
56f2b4bd19f40e6d1404f3879a262791fdf1f6b62c77813fac99320f13b5c7a4 pexels-cup-of-couple-6963787.jpg
57244fa4e659ecc33080ead494ebc3091a40e139cd5c1407bfb108e383f6621f pexels-cup-of-couple-7303788.jpg
c6a85f3ce5137dc260ed1e42f9cef49a4e46df8dcbb5acadfc6c15682347bda2 pexels-cup-of-couple-7303987.jpg
40fe5865493fa6b33caa8db1321696288834579df6fb8e36881b69f17111ed27 pexels-karola-g-7602925.jpg
a8bc8f01cbc94905463de3b9608557ca4d3291d9e2e15bacea463a4c20a4de9c pexels-maksgelatin-4352247.jpg
""",
    ),
    "lomiri-photos": (  # CC BY(-SA) 4.0 and CC0: wallpapers of a telephone
        "usr/share/backgrounds",
        """
bd86b081f9975e2b83527f71e49b9271a8ab40885428395969d9f7d834d7f050 Bridge_by_Sander_Klootwijk.jpg
af5af17841009732def24b09bb1e669a1b09d2b4bdeee7812c371101c30d2bb3 Dragonfly_by_Bolly.jpg
c8c0ab18e48d9e0419fe42881112137f3afafc27dfddc29ec3a6d54c56d225ad Picture_0B_by_freespace.jpg
89e86af38d04daaef975665dc2127e9fa76f0fd68f4eea105a2d0ae3390b010b Picture_1A_by_freespace.jpg
d2e96e6d4da40dd804b3d0ce295e94de04a2d7d9b6785d42cd9d92ba58bced74 Wine_by_Jakkub_Mede.jpg
66268e7b48f8854d36a28765fac6e23ec1aee251daa6da1f64715f201020ad36 aitzgorri_by_Aitzol_Berasategi.jpg
85a5453c2fed514c75973016f3d862aca62eb7ca087618822469274ac1092373 free_by_Peter_Nerlich.jpg
cc40e313c74e421edffe3403def413c16878ce14661cce7ec5915baeab35538d friends_by_Aitzol_Berasategi.jpg
e7b20e2db9dcd6e2b278ca55873c2110b35d89cd38b04d0b18728726888e6889 greentock_by_Peter_Nerlich.jpg
4c119350ead80201fe256850c3d316309ddfb4bdf10b235ce982dcde0c667c05 life_by_Aitzol_Berasategi.jpg
414d0072b2f6f2c555deafeaef6e45c4fed6fa9ad26eba6560ca8803959cf97a picosdeeuropa_by_Aitzol_Berasategi.jpg
a5634d1ab5e41a3568e92d4a894a500c92b891f9ff734e50bd224d6e185a605f seeding_by_Clements_Engelhardt.jpg
474dab6a4b9f94dc76c29dfe30e9f5db4af0fd2e33fe5d695f8152b371efca18 sunset_by_Aitzol_Berasategi.jpg
""",  # noqa: E501
    ),
    "gcompris-photos": (  # CC and public domain; bench.dense_assets leaves the others out
        "usr/share/gcompris-qt/rcc",
        """
984852ac8377a224c94e26a5bc8a13d0a589612030902c6d76c14509fef3c984 categorization.rcc
85599f387a1f0da48d8e9e4502e6ef1ba9e826391bc4d6feb3b1f614d2d0ebdd explore_world_animals.rcc
""",
    ),
    "esrgan-slim": (  # MIT: a super-resolution network in the layers format of TensorFlow.js
        "package/models/x2",
        """
8efb488c2caed0196a6163e3f06798f9245e92623ffd50654a26c372e09150ea model.json
5cb464ae4d390ce0a771afd5feaf60fbfcdb18ab48a56db98cdf6b88202369de group1-shard1of1.bin
""",
    ),
}
