//! Adapters in GGUF files.

use burn::module::Module;
use models::{CheckpointError, Config, Error, Pretrained, save_gguf_adapters};
use peft::{Linears, Lora, Method, Peqa, Targets, attach};
use quant_core::Rtn;
use tensor_files::gguf::GgufFile;

use super::fixtures::*;

fn adapted(config: impl Into<Config>, method: &dyn Method) -> Pretrained {
    let (_dir, mut lm) = pretrained(config, 3);
    attach(&mut lm.model, method).unwrap();
    // Factors of zeros would show nothing.
    lm.model = lm.model.map(&mut Unround);
    lm
}

/// `scale · A B` of each layer is `alpha / r · B A` of the file, whose rows of queries and keys are those of
/// llama.cpp: halves of a head become neighbors.
#[test]
fn the_products_are_those_of_the_adapters() {
    for (config, is_llama) in [(llama(), true), (llama().with_attention_bias(true), false)] {
        let head_dim = config.head_dim;
        let lora = Lora::new(3).with_alpha(5.0).with_rank_stabilized(true);
        let lm = adapted(config, &lora);
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("adapters");
        save_gguf_adapters(&lm, &out).unwrap();
        let mut file = GgufFile::open(&out.join("adapter.gguf")).unwrap();
        assert_eq!(file.names().count(), 2 * 14);
        let alpha = file.metadata()["adapter.lora.alpha"].as_f64().unwrap();
        assert!((alpha / 3.0 - 5.0 / 3f64.sqrt()).abs() < 1e-6, "{alpha}");
        for (key, value) in [
            ("general.type", "adapter"),
            ("adapter.type", "lora"),
            (
                "general.architecture",
                if is_llama { "llama" } else { "qwen2" },
            ),
        ] {
            assert_eq!(file.metadata()[key].as_str().unwrap(), value);
        }
        for (path, linear) in lm.model.linears() {
            let product = linear.adapter().unwrap().low_rank().unwrap();
            let expected = values(product.a.matmul(product.b) * product.scale);
            let [d_in, d_out] = linear.weight().dims();
            let part = path.rsplit('.').next().unwrap();
            let name = match part {
                "q_proj" => "attn_q",
                "k_proj" => "attn_k",
                "v_proj" => "attn_v",
                "o_proj" => "attn_output",
                "gate_proj" => "ffn_gate",
                "up_proj" => "ffn_up",
                _ => "ffn_down",
            };
            let block = path.split('.').nth(2).unwrap();
            let name = format!("blk.{block}.{name}.weight");
            let a = file.values(&format!("{name}.lora_a"), [3, d_in]).unwrap();
            let b = file.values(&format!("{name}.lora_b"), [d_out, 3]).unwrap();
            for row in 0..d_out {
                let in_file = if is_llama && matches!(part, "q_proj" | "k_proj") {
                    let (head, within) = (row / head_dim, row % head_dim);
                    let half = head_dim / 2;
                    head * head_dim + 2 * (within % half) + within / half
                } else {
                    row
                };
                for input in 0..d_in {
                    let terms = (0..3).map(|r| b[in_file * 3 + r] * a[r * d_in + input]);
                    let found = terms.sum::<f32>() * alpha as f32 / 3.0;
                    let expected = expected[input * d_out + row];
                    let error = (found - expected).abs();
                    assert!(
                        error <= 1e-6 * (1.0 + expected.abs()),
                        "{path}: {found}, {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn what_is_no_product_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapters");
    let (_dir, mut lm) = pretrained(llama(), 3);
    let error = save_gguf_adapters(&lm, &out).unwrap_err();
    assert!(
        matches!(error, Error::Peft(peft::Error::NoAdapters)),
        "{error}"
    );
    models::quantize(&mut lm.model, &Rtn::new(), &[], |_| {}).unwrap();
    attach(&mut lm.model, &Peqa::new()).unwrap();
    let error = save_gguf_adapters(&lm, &out).unwrap_err();
    let Error::Checkpoint(CheckpointError::GgufAdapters { layers }) = &error else {
        panic!("{error}");
    };
    assert_eq!(layers.len(), 14);
    assert_says(error, &["PEQA"]);
    let dora = Lora::new(2)
        .with_dora(true)
        .with_targets(Targets::from(["q_proj"]));
    let lm = adapted(llama(), &dora);
    let error = save_gguf_adapters(&lm, &out).unwrap_err();
    assert_says(error, &["DoRA"]);
    let lm = adapted(opt(), &Lora::new(2));
    assert_says(save_gguf_adapters(&lm, &out).unwrap_err(), &["opt"]);
    assert!(!out.exists());
}
