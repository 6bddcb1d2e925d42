// Runs an AOTInductor package that `zs3fast export ... model.aoti.pt2` wrote: torch's C++ library, no Python, nothing of zs3fast.
//
//   T=$(python -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parent)")
//   g++ -std=c++20 main.cpp -I$T/include -I$T/include/torch/csrc/api/include -L$T/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -Wl,-rpath,$T/lib -o run
//   ./run model.aoti.pt2 512
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdlib>
#include <iostream>

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: run model.aoti.pt2 [side in pixels]\n";
    return 2;
  }
  const int64_t side = argc > 2 ? std::atoi(argv[2]) : 64;
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  // An image of your own goes here: uint8 [1, 3, H, W] in RGB, of the size the package was made for.
  const torch::Tensor image = torch::randint(0, 256, {1, 3, side, side}, torch::kUInt8);
  const std::vector<torch::Tensor> out = model.run({image});
  std::cout << "labels " << out[0].sizes() << ", " << std::get<0>(torch::_unique(out[0])).numel() << " classes found, mean score "
            << out[1].mean().item<float>() << "\n";
  return 0;
}
