//! Models through every format that holds them.

use burn::tensor::{Tensor, TensorData};
use models::CheckpointFormat::{Bitsandbytes, Gptq, QuantCore};
use models::GptqVersion::{V1, V2};
use peft::{CausalLm, PerLayer};
use proptest::prelude::*;
use quant_core::{DoubleQuant, Grid, NormalFloat, Rtn};
use safetensors::Dtype;
use serde_json::json;

use super::*;
use crate::fixtures::{cases, head_format, values};

proptest! {
    #![proptest_config(cases(24))]

    /// A model is the same through version 1, if it is symmetric, version 2 and the exact format.
    #[test]
    fn gptq_gives_the_model_back(
        bits in prop::sample::select(vec![2, 3, 4, 8]),
        group_size in prop::sample::select(vec![None, Some(8), Some(32)]),
        symmetric in any::<bool>(),
        ordered in any::<bool>(),
    ) {
        let rtn = Rtn::new().with_bits(bits).with_group_size(group_size).with_symmetric(symmetric);
        let (dir, mut lm) = quantized(&config(32, 64), &rtn);
        round_to_gptq(&mut lm.model);
        if ordered && group_size.is_some() {
            // Sorting by group keeps the inputs of a group in their order.
            for (_, linear) in lm.model.linears_mut() {
                let [d_in, _] = linear.weight().dims();
                let n_groups = d_in.div_ceil(group_size.unwrap());
                change(linear, |parts, format| {
                    let mut order: Vec<u32> = (0..d_in as u32).collect();
                    order.sort_by_key(|input| *input as usize % n_groups);
                    parts.input_order = Some(order).filter(|order| !order.is_sorted());
                    format
                });
            }
        }
        let first = Gptq(if symmetric { V1 } else { V2 });
        let lm = reads_back(&dir, &lm, first);
        let once = tensors(&dir.path().join(first.to_string()));
        let lm = if symmetric { reads_back(&dir, &lm, Gptq(V2)) } else { lm };
        let lm = reads_back(&dir, &lm, QuantCore);
        save_as(&lm, dir.path().join("again"), first).unwrap();
        prop_assert!(once == tensors(&dir.path().join("again")));
    }

    /// So it is through bitsandbytes' format, with rows that blocks straddle and without.
    #[test]
    fn bitsandbytes_gives_the_model_back(
        inner in prop::sample::select(vec![32, 96, 160, 33, 7]),
        block in prop::sample::select(vec![32, 64, 128]),
        double in any::<bool>(),
        float in any::<bool>(),
    ) {
        // As bitsandbytes quantizes: flattened, whatever the rows.
        let (dir, mut lm) = pretrained(&config(32, inner));
        let grid = if float { Grid::Float4 } else { Grid::NormalFloat };
        for (_, linear) in lm.model.linears_mut() {
            let dims @ [d_in, d_out] = linear.weight().dims();
            let group = (1..=block).rev().find(|g| block % g == 0 && d_in % g == 0).unwrap();
            let repeated = block / group;
            let n_groups = d_in / group;
            let format = Format::new(4, Some(group), grid).unwrap();
            let layout = format.layout(dims).unwrap();
            let n_words = layout.words_shape().iter().product();
            let plain = QuantTensor::from_parts(
                Parts::new(vec![0; n_words], vec![0.0; n_groups * d_out], None),
                format,
                dims,
                &Device::flex(),
            );
            let bias = linear.bias().map(|b| Param::from_tensor(b).set_require_grad(false));
            *linear = Linear::new(Weight::Quant(plain.unwrap()), bias);
            change(linear, |parts, format| {
                let columns = (0..layout.word_rows() * d_out).map(|k| match layout.word_rows() {
                    // Past the last input there are zero codes.
                    n if k / d_out + 1 == n && d_in % 8 > 0 => {
                        (k as u32).wrapping_mul(0x9E37_79B9) & ((1 << (4 * (d_in % 8))) - 1)
                    }
                    _ => (k as u32).wrapping_mul(0x9E37_79B9),
                });
                let columns: Vec<u32> = columns.collect();
                let of_block = |k: usize| (k / repeated * 37 % 101) as u8;
                let mut scales = vec![0.0; n_groups * d_out];
                for (k, scale) in (0..d_out * n_groups).map(|k| (k, f32::from(of_block(k)) / 7.0)) {
                    scales[k % n_groups * d_out + k / n_groups] = scale;
                }
                *parts = Parts::from_columns(&columns, &layout, scales, None).unwrap();
                if !double {
                    return format;
                }
                let double = DoubleQuant { block_size: 256 * repeated, ..DoubleQuant::dynamic() };
                let n_blocks = (d_out * n_groups).div_ceil(double.block_size);
                parts.scales = Scales::Double(quant_core::DoubleScales {
                    codes: (0..d_out * n_groups).map(of_block).collect(),
                    absmax: (0..n_blocks).map(|k| 1.0 + k as f32 / 3.0).collect(),
                    offset: 0.1,
                });
                format.with_double_quant(double).unwrap()
            });
        }
        let lm = reads_back(&dir, &lm, Bitsandbytes);
        let once = tensors(&dir.path().join("bitsandbytes"));
        let lm = reads_back(&dir, &lm, QuantCore);
        save_as(&lm, dir.path().join("again"), Bitsandbytes).unwrap();
        prop_assert!(once == tensors(&dir.path().join("again")));
        let name = "model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__";
        let state = &once[&format!("{name}{}", if float { "fp4" } else { "nf4" })];
        let state: Value = serde_json::from_slice(&state.2).unwrap();
        prop_assert_eq!(&state["blocksize"], &json!(block));
    }
}

#[test]
fn the_exact_format_holds_every_layer() {
    let double = NormalFloat::new()
        .with_block_size(8)
        .with_double_quant(DoubleQuant::dynamic());
    let (dir, mut lm) = quantized(&config(24, 20), &double);
    reorder(&mut lm.model);
    let again = reads_back(&dir, &lm, QuantCore);
    let ids = Tensor::from_data(TensorData::from([[3i32, 1, 4, 1, 5]]), &Device::flex());
    let bits = |lm: &Pretrained| -> Vec<u32> {
        let logits = values(lm.model.forward(ids.clone())).into_iter();
        logits.map(f32::to_bits).collect()
    };
    assert_eq!(bits(&again), bits(&lm));

    let layers = |name: &str| {
        let tensors = tensors(&dir.path().join("quant-core"));
        let name = format!("model.layers.0.mlp.up_proj.{name}");
        tensors
            .get(&name)
            .map(|(dtype, shape, _)| (*dtype, shape.clone()))
    };
    assert_eq!(layers("scale_codes"), Some((Dtype::U8, vec![20, 3])));
    assert_eq!(layers("scale_absmax").unwrap().1, [1]);
    assert_eq!(layers("scale_offset").unwrap().1, [1]);
    assert_eq!(layers("input_order"), Some((Dtype::I32, vec![24])));
    assert_eq!(layers("scales"), None);

    // An order that takes an input twice.
    let path = dir.path().join("quant-core");
    let mut damaged = tensors(&path);
    let name = "model.layers.0.mlp.up_proj.input_order";
    damaged.get_mut(name).unwrap().2[..4].copy_from_slice(&0u32.to_le_bytes());
    write(&path, &damaged);
    let error = load(&path, &Device::flex()).unwrap_err();
    assert_says(&error, &["model.layers.0.mlp.up_proj"]);
}

#[test]
fn projections_that_are_dense_stay_so() {
    for (quantizer, format) in [
        (&Rtn::new().with_group_size(8) as &dyn Quantizer, Gptq(V2)),
        (&NormalFloat::new().with_block_size(32), Bitsandbytes),
    ] {
        let (dir, mut lm) = pretrained(&config(32, 64));
        for (path, linear) in lm.model.linears_mut() {
            if !path.ends_with("o_proj") {
                linear.quantize(&path, quantizer, None).unwrap();
            }
        }
        for (path, linear) in lm.model.linears_mut() {
            if !path.ends_with("o_proj") {
                change(linear, |parts, kept| {
                    match &mut parts.scales {
                        Scales::Float(scales) if format == Gptq(V2) => scales.fill(0.125),
                        _ => {}
                    }
                    kept
                });
            }
        }
        reads_back(&dir, &lm, format);
        let config = fs::read_to_string(dir.path().join(format.to_string()).join("config.json"));
        let part = match format {
            Bitsandbytes => "\"model.layers.0.self_attn.o_proj\",\n      \"lm_head\"",
            _ => r#""-:^model\\.layers\\.0\\.self_attn\\.o_proj$": {}"#,
        };
        assert_says(config.unwrap(), &[part]);
    }
}

/// A head that is packed in the format of the projections, or in another one that the file format has.
#[test]
fn heads_are_packed_in_every_format() {
    let symmetric = Rtn::new().with_group_size(8).with_symmetric(true);
    let affine = Rtn::new().with_bits(8).with_group_size(32);
    let nf4 = NormalFloat::new().with_block_size(32);
    let cases: [(CheckpointFormat, &dyn Quantizer, &dyn Quantizer, &str); 4] = [
        (
            Gptq(V1),
            &symmetric,
            &symmetric.with_bits(8),
            r#""lm_head": true"#,
        ),
        (Gptq(V2), &symmetric, &affine, r#""+:^lm_head$": {"#),
        (QuantCore, &affine, &nf4, r#""lm_head": {"#),
        (Bitsandbytes, &nf4, &nf4, r#""llm_int8_skip_modules": []"#),
    ];
    for (format, quantizer, of_head, stated) in cases {
        for tied in [true, false] {
            // A vocabulary that fills words of 32 bits.
            let config = config(32, 64)
                .with_vocab_size(32)
                .with_tie_word_embeddings(tied);
            let (dir, mut lm) = quantized(&config, quantizer);
            models::quantize_head(&mut lm.model, of_head).unwrap();
            if format != Bitsandbytes {
                round_to_gptq(&mut lm.model);
                round_head(&mut lm.model);
            }
            let again = reads_back(&dir, &lm, format);
            assert_eq!(head_format(&again.model), head_format(&lm.model));
            let config = dir.path().join(format.to_string()).join("config.json");
            assert_says(fs::read_to_string(config).unwrap(), &[stated]);
            let planned = models::plan(dir.path().join(format.to_string()), &PerLayer::default());
            assert_eq!(planned.unwrap().layers.len(), 7);
        }
    }
    // A format has its reasons against a head as against any layer.
    let (_dir, mut lm) = quantized(&config(32, 64), &symmetric);
    round_to_gptq(&mut lm.model);
    models::quantize_head(&mut lm.model, &nf4).unwrap();
    let (layers, instead) = cannot_hold(&lm, Gptq(V2));
    let [(path, reason)] = &layers[..] else {
        panic!("{layers:?}");
    };
    assert_eq!((path.as_str(), instead.as_str()), ("lm_head", "quant-core"));
    assert_says(reason, &["4-bit normal float", "uniform"]);
}
