//! bitsandbytes checkpoints and models that are refused.

use models::CheckpointFormat::Bitsandbytes;
use quant_core::{DoubleQuant, NormalFloat, Rtn, ScaleLevels};
use serde_json::json;

use super::*;

#[test]
fn bitsandbytes_checkpoints_that_cannot_be_read_right_are_refused() {
    let config = |setting: &'static str, value: Value| {
        refusal(NF4, |config, _| {
            let settings = &mut config["quantization_config"];
            settings[setting] = value.clone();
            settings[format!("_{setting}")] = value;
        })
    };
    assert_says(
        config("load_in_8bit", json!(true)),
        &["load_in_8bit", "4 bits"],
    );
    assert_says(config("load_in_4bit", json!(false)), &["load_in_4bit"]);
    assert_says(
        config("bnb_4bit_quant_storage", json!("bfloat16")),
        &["is U8", "that of BF16"],
    );

    let state = |from: &'static str, to: &'static str| {
        refusal(NF4, |_, all| {
            let name = format!("{LAYER}.weight.quant_state.bitsandbytes__nf4");
            let tensor = all.get_mut(&name).unwrap();
            let text = String::from_utf8(tensor.2.clone()).unwrap();
            assert!(text.contains(from), "{from} in {text}");
            tensor.2 = text.replace(from, to).into_bytes();
            tensor.1 = vec![tensor.2.len()];
        })
    };
    assert_says(
        state("\"nf4\"", "\"fp4\""),
        &["bitsandbytes__nf4", "quant_type `fp4`"],
    );
    assert_says(state("64, \"dtype", "0, \"dtype"), &["blocksize 0"]);
    assert_says(state("64, \"dtype", "48, \"dtype"), &["blocksize 48"]);
    assert_says(state("64, \"dtype", "-64, \"dtype"), &["cannot be read"]);
    assert_says(
        state("64, \"dtype", "128, \"dtype"),
        &["absmax", "[160]", "[80]"],
    );
    assert_says(state("[64, 160]", "[160, 64]"), &["[160, 64]", "[64, 160]"]);
    assert_says(state("[64, 160]", "[64, 160, 1]"), &["[64, 160, 1]"]);
    assert_says(state("ize\": 256", "ize\": 0"), &["nested_blocksize 0"]);
    assert_says(
        state("ize\": 256", "ize\": 18446744073709551615"),
        &["nested_blocksize 1844"],
    );
    assert_says(
        state("ize\": 256", "ize\": 32"),
        &["nested_absmax", "[1]", "[5]"],
    );
    assert_says(state("\"nested_blocksize\": 256, ", ""), &["alone"]);
    assert_says(
        state(
            "\"nested_dtype\": \"float32\"",
            "\"nested_dtype\": \"float16\"",
        ),
        &["`float16`"],
    );
    assert_says(state("{", "["), &["cannot be read"]);

    let table = |part: &'static str| {
        refusal(NF4, |_, all| {
            put(all, &format!("weight.{part}"), 3, 0.5f32.to_bits())
        })
    };
    assert_says(
        table("quant_map"),
        &["quant_map", "level 3 is 0.5", "-0.3949"],
    );
    assert_says(
        table("nested_quant_map"),
        &["nested_quant_map", "level 3 is 0.5"],
    );
    let error = refusal(NF4, |_, all| {
        let weight = all.get_mut(&format!("{LAYER}.weight")).unwrap();
        weight.1 = vec![5119, 1];
        weight.2.pop();
    });
    assert_says(&error, &["[5119, 1]", "[5120, 1]"]);
    assert_says(
        config("bnb_4bit_quant_storage", json!("complex64")),
        &["`complex64`", "uint8"],
    );
    let error = refusal(NF4, |_, all| {
        let head = all[&format!("{LAYER}.weight.quant_state.bitsandbytes__nf4")].clone();
        let name = "lm_head.weight.quant_state.bitsandbytes__nf4";
        all.insert(name.into(), head);
    });
    // Of another layer.
    assert_says(&error, &["`lm_head.weight.quant_state", "[64, 160]"]);
}

#[test]
fn models_that_bitsandbytes_does_not_hold_are_refused() {
    let refused = |quantizer: &dyn Quantizer, make: &dyn Fn(&mut Model)| {
        let (_dir, mut lm) = pretrained(&config(32, 64));
        for (path, linear) in lm.model.linears_mut() {
            linear.quantize(&path, quantizer, None).unwrap();
        }
        make(&mut lm.model);
        cannot_hold(&lm, Bitsandbytes)
    };
    let unchanged = |_: &mut Model| ();
    let (layers, instead) = refused(&Rtn::new().with_group_size(8), &unchanged);
    assert_eq!((layers.len(), instead.as_str()), (7, "quant-core"));
    assert_says(&layers[0].1, &["4-bit affine", "NF4 and FP4"]);
    let (_, instead) = refused(&Rtn::new().with_group_size(8), &round_to_gptq);
    assert_eq!(instead, "GPTQ v2");
    let nf4 = NormalFloat::new();
    let (layers, _) = refused(&nf4.with_bits(3).with_block_size(32), &unchanged);
    assert_says(&layers[0].1, &["3-bit normal float"]);
    let (layers, _) = refused(&nf4.with_block_size(8), &unchanged);
    assert_says(&layers[0].1, &["groups of 8 among 32 inputs"]);
    let (layers, instead) = refused(&nf4.with_block_size(32), &reorder);
    assert_says(&layers[0].1, &["another order"]);
    assert_eq!(instead, "quant-core");
    let unsigned = DoubleQuant {
        levels: ScaleLevels::Unsigned { bits: 8 },
        block_size: 256,
    };
    let (layers, _) = refused(
        &nf4.with_block_size(32).with_double_quant(unsigned),
        &unchanged,
    );
    assert_says(&layers[0].1, &["dynamic map"]);
    let smaller = DoubleQuant {
        block_size: 64,
        ..DoubleQuant::dynamic()
    };
    let (layers, _) = refused(
        &nf4.with_block_size(32).with_double_quant(smaller),
        &unchanged,
    );
    assert_says(&layers[0].1, &["blocks of 64", "256 scales"]);
}
