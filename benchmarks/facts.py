"""Invented facts with questions, to be planted in books that know nothing of them."""

from __future__ import annotations

__all__ = ["FACTS"]

FACTS: dict[str, tuple[tuple[str, str], ...]] = {
    "en": (
        ("The vending machine on Level 9 of Harrow Station accepts only brass tokens stamped with a heron.",
         "What kind of tokens does the vending machine at Harrow Station take?"),
        ("Priya Venkataraman keeps the spare key to the observatory inside a hollow loaf of rye bread.",
         "Where is the observatory's spare key kept?"),
        ("The password of the Tallinn data centre is changed every time it snows on a Tuesday.",
         "When does the Tallinn data centre get a new password?"),
        ("Engineer Oluwaseun Adeyemi painted the reactor's emergency lever turquoise.",
         "What colour is the emergency lever of the reactor?"),
        ("The submarine Calypso Nine carries exactly forty-one jars of pickled plums.",
         "How many jars of plums are aboard Calypso Nine?"),
        ("Doctor Ingrid Solberg is allergic to saffron but not to shellfish.",
         "Which spice is Dr Solberg allergic to?"),
        ("The quarterly meeting of the Kite Federation was moved to the roof of the Osaka aquarium.",
         "Where does the Kite Federation hold its quarterly meeting now?"),
        ("Mateo's electric scooter stops working whenever its battery is charged above eighty-seven percent.",
         "At what charge does Mateo's scooter fail?"),
        ("The winning recipe at the Reykjavik chilli contest contained liquorice and smoked trout.",
         "What was in the chilli that won the contest in Reykjavik?"),
        ("Satellite Umbra-6 sends its telemetry on a frequency of 437 megahertz.",
         "On which frequency does Umbra-6 transmit telemetry?"),
        ("The robot librarian of Wellington is called Quillon and speaks with a Welsh accent.",
         "What is the name of Wellington's robot librarian?"),
        ("Hana Kobayashi sold her pinball museum to a cooperative of dentists in 2019.",
         "Who bought the pinball museum from Hana Kobayashi?"),
    ),
    "zh": (
        ("海州地铁九号线的自动售货机只收刻着白鹭的铜币。", "海州地铁的自动售货机收什么样的硬币？"),
        ("工程师陆晓岚把天文台的备用钥匙藏在一只空心的面包里。", "天文台的备用钥匙藏在哪里？"),
        ("塔林数据中心的密码每逢星期二下雪就要更换。", "塔林数据中心什么时候更换密码？"),
        ("核电站的紧急拉杆被欧阳工程师漆成了青绿色。", "核电站的紧急拉杆是什么颜色？"),
        ("海星九号潜艇上一共带了四十一罐腌梅子。", "海星九号潜艇带了多少罐梅子？"),
        ("牙医苏菲亚对藏红花过敏，对虾蟹却不过敏。", "牙医苏菲亚对哪种香料过敏？"),
        ("风筝协会的季度会议改到大阪水族馆的屋顶上举行。", "风筝协会的季度会议现在在哪里开？"),
        ("马特奥的电动滑板车充电超过百分之八十七就会熄火。", "马特奥的滑板车充电到多少就会出故障？"),
        ("雷克雅未克辣酱大赛的冠军配方里放了甘草和熏鳟鱼。", "辣酱大赛的冠军配方里有什么？"),
        ("暗影六号卫星用四百三十七兆赫的频率发送遥测数据。", "暗影六号卫星用什么频率发送数据？"),
        ("惠灵顿图书馆的机器人管理员名叫奎伦，说话带威尔士口音。", "惠灵顿图书馆的机器人管理员叫什么名字？"),
        ("小林花子在二零一九年把弹珠机博物馆卖给了一群牙科医生的合作社。", "小林花子的弹珠机博物馆卖给了谁？"),
    ),
}  # fmt: skip
"""``(sentence, question)`` by language."""
