//! Against PEFT's LoftQ: see `golden/README.md`.

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use loftq::{Layer, LayerMethod, Loftq, Truncation};
use quant_core::{NormalFloat, sum_of_squares};
use safetensors::SafeTensors;
use serde_json::Value;

/// The matrix of this name, transposed: `[in, out]` of `[out, in]`.
fn transposed(file: &SafeTensors, name: &str) -> Tensor<2> {
    let tensor = file.tensor(name).unwrap_or_else(|_| panic!("{name}"));
    let (values, _) = tensor.data().as_chunks::<4>();
    let values: Vec<f32> = values
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes))
        .collect();
    let dims = [tensor.shape()[0], tensor.shape()[1]];
    Tensor::from_data(TensorData::new(values, dims), &Device::flex()).transpose()
}

fn norm(matrix: Tensor<2>) -> f64 {
    sum_of_squares(matrix).sqrt()
}

#[test]
fn every_round_is_pefts() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let bytes = std::fs::read(dir.join("peft.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let expected = std::fs::read_to_string(dir.join("peft.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let weight = transposed(&file, "weight");
    let layer = Layer {
        path: "weight",
        weight: weight.clone(),
        gram: None,
        fisher: None,
    };
    for bits in [4, 2] {
        let quantizer = NormalFloat::new().with_bits(bits);
        for rounds in [1, 2, 5] {
            let truncation = Truncation {
                tolerance: 1e-8,
                seed: 1,
            };
            let loftq = Loftq::new(8)
                .with_rounds(rounds)
                .with_truncation(truncation);
            let (_, errors) = loftq.trace(&layer, &quantizer).unwrap();
            let name = format!("b{bits}_r8_t{rounds}");
            let found = errors[rounds - 1].sqrt() / norm(weight.clone());
            let expected = expected[&name]["rel_err"].as_f64().unwrap();
            assert!(
                (found - expected).abs() < 1e-4,
                "{name}: {found}, {expected}"
            );
        }

        // After one round the weight is the same, and so is the product of the factors.
        let start = Loftq::new(8)
            .with_rounds(1)
            .with_truncation(Truncation {
                tolerance: 1e-8,
                seed: 1,
            })
            .start(&layer, &quantizer)
            .unwrap();
        let name = |tensor: &str| format!("b{bits}_r8_t1.{tensor}");
        let of_weight = start.weight.to_dense() - transposed(&file, &name("q"));
        assert!(of_weight.abs().max().into_scalar::<f32>() < 1e-6);
        let [a, b] = start.factors.unwrap();
        let (theirs_a, theirs_b) = (
            transposed(&file, &name("lora_a")),
            transposed(&file, &name("lora_b")),
        );
        let theirs = theirs_a.matmul(theirs_b);
        let difference = norm(a.matmul(b) - theirs.clone()) / norm(theirs);
        assert!(difference < 1e-3, "{bits} bits: {difference}");
    }
}
