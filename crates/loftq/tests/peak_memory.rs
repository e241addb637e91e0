//! The memory of an initialization beside the weight.

#[path = "../../kernels/tests/counting/mod.rs"]
mod counting;

use burn::tensor::{Device, Distribution, Tensor};
use loftq::{Layer, LayerMethod, Loftq, LqLora, Pissa, Qera};
use quant_core::{Gram, NormalFloat, Rtn};

const WIDTH: usize = 1024;

/// With the weight itself, that is.
#[test]
fn a_layer_takes_less_than_four_of_its_weights() {
    let device = Device::flex();
    device.seed(1);
    let weight = Tensor::<2>::random([WIDTH, WIDTH], Distribution::Normal(0.0, 0.1), &device);
    let mut gram = Gram::new(WIDTH, &device);
    gram.update(weight.clone());
    let layer = Layer {
        path: "proj",
        weight: weight.clone(),
        gram: Some(&gram),
        fisher: None,
    };
    let n_bytes = 4 * WIDTH * WIDTH;
    let methods: [(&str, Box<dyn LayerMethod>); 4] = [
        ("loftq", Box::new(Loftq::new(16))),
        ("pissa", Box::new(Pissa::new(16))),
        ("lq-lora", Box::new(LqLora::new(16).with_max_rounds(5))),
        ("qera", Box::new(Qera::new(16))),
    ];
    for (name, method) in methods {
        for quantizer in [
            &NormalFloat::new() as &dyn quant_core::Quantizer,
            &Rtn::new().with_bits(2).with_group_size(64),
        ] {
            // The libraries of products keep buffers of a fixed size for each thread.
            method.start(&layer, quantizer).unwrap();
            // A thread that a busy machine kept from taking part makes its own in a later run.
            let peaks = [(); 3].map(|()| {
                counting::peak_of(|| {
                    method.start(&layer, quantizer).unwrap();
                })
            });
            let peak = peaks.into_iter().min().unwrap();
            // The closed form has the root of the Gram too, and its product with the error.
            let allowed = if name == "qera" { 9 } else { 6 } * n_bytes / 2;
            assert!(
                peak < allowed,
                "{name}: {:.2} weights beside the first",
                peak as f64 / n_bytes as f64
            );
        }
    }
}
